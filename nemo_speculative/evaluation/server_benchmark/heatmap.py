"""A picture of a sweep: settings down, concurrency across, in one SVG file that needs nothing else."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import log2

from nemo_speculative.evaluation.server_benchmark.results_log import Measured
from nemo_speculative.evaluation.server_benchmark.table import in_order, speed_up
from nemo_speculative.utils import svg

WIDTH, HEIGHT, LEFT, TOP = 108, 44, 132, 64
"""Pixels: of a field, and of what stands left of and above the fields of a panel."""
LETTER = 8
"""Pixels that a letter of a title takes, at most."""
EQUAL = (247, 247, 244)
FULL = 1.6
"""Doublings of the baseline's speed at which a color is full."""


def heat_map(cells: Iterable[Measured]) -> str:
    """An SVG document: a panel for each suite and temperature; a field says speed-up over the baseline and tokens/s.

    Where no baseline was measured a field is left white.
    """
    measured = in_order([cell for cell in cells if cell.figures])
    panels = [list(group) for _, group in groupby(measured, key=lambda one: (one.cell.suite, one.cell.temperature))]
    drawn, top, width = [], 0, 0
    for panel in panels:
        text, right, bottom = _panel(panel, measured, top)
        drawn.append(text)
        top, width = bottom, max(width, right)
    size = f'width="{width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {top}">'
    return "\n".join([head, f"<style>{svg.STYLE}</style>", f'<rect {size} fill="#fff"/>', *drawn, "</svg>", ""])


def _panel(panel: Sequence[Measured], measured: Sequence[Measured], top: int) -> tuple[str, int, int]:
    """One panel's text, and where it ends on the right and below."""
    at_once = sorted({one.cell.concurrency for one in panel})
    settings = sorted({one.cell.setting for one in panel}, key=_order)
    title = f"{panel[0].cell.suite}, temperature {panel[0].cell.temperature:g}: speed-up and tokens/s"
    parts = [
        svg.text(12, top + 22, title, "title"),
        svg.text(12, top + TOP - 8, "steps-topk-tokens", "small"),
    ]
    parts += [
        svg.text(LEFT + WIDTH * (i + 0.5), top + TOP - 8, f"{n} at once", "middle") for i, n in enumerate(at_once)
    ]
    parts += [svg.text(12, top + TOP + HEIGHT * (j + 0.6), setting) for j, setting in enumerate(settings)]
    for one in panel:
        x = LEFT + WIDTH * at_once.index(one.cell.concurrency)
        y = top + TOP + HEIGHT * settings.index(one.cell.setting)
        parts.append(_field(x, y, one, speed_up(one, measured)))
    return (
        "\n".join(parts),
        max(LEFT + WIDTH * len(at_once), LETTER * len(title)) + 16,
        top + TOP + HEIGHT * len(settings) + 16,
    )


def _field(x: int, y: int, one: Measured, gain: float | None) -> str:
    assert one.figures is not None
    speed = f"{one.figures.output_tokens_per_second:.1f}"
    lines, fill = [(speed, 0.6, "middle")], "#fff"
    if gain is not None:
        lines, fill = [(f"{gain:.2f}x", 0.45, "middle"), (speed, 0.82, "small middle")], _color(gain)
    box = f'<rect x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" fill="{fill}" stroke="#ddd"/>'
    return box + "".join(svg.text(x + WIDTH / 2, y + HEIGHT * down, said, classes) for said, down, classes in lines)


def _color(gain: float) -> str:
    share = min(abs(log2(gain)) / FULL, 1.0)
    end = svg.GOOD if gain > 1 else svg.BAD
    # Three quarters of the way at most, so that dark letters stay readable.
    mixed = [round(a + (b - a) * share * 0.75) for a, b in zip(EQUAL, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _order(setting: str) -> list[int]:
    return [] if setting == "baseline" else [int(number) for number in setting.split("-")]
