"""The report's plots: bars and curves as SVG, with colors from the page's style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log

from nemo_speculative.utils.svg import text

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 44
"""Margins in pixels."""
FIELD_WIDTH, FIELD_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
GRID_LINES = 4
MAX_LABELS = 12
MAX_BAR_WIDTH = 80
LINE_HEIGHT = 16


def bars(title: str, axis: str, counts: Sequence[tuple[str, float]], mark: int | None = None) -> str:
    """A bar for each label, with a vertical line at the left edge of bar ``mark``."""
    most = max((value for _, value in counts), default=0) or 1
    step = min(FIELD_WIDTH / max(len(counts), 1), MAX_BAR_WIDTH)
    every = -(-len(counts) // MAX_LABELS)
    parts = [_grid_line(share, f"{most * share:,.0f}") for share in (n / GRID_LINES for n in range(GRID_LINES + 1))]
    for n, (label, value) in enumerate(counts):
        x, tall = LEFT + n * step, FIELD_HEIGHT * value / most
        box = f'x="{x + step * 0.08:.1f}" y="{_y(value / most):.1f}" width="{step * 0.84:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(label)}: {value:,.0f}</title></rect>')
        if n % every == 0:
            parts.append(text(x + step / 2, HEIGHT - BOTTOM + 16, label, "small middle"))
    if mark is not None:
        parts.append(_vertical_line(LEFT + mark * step))
    return _svg(title, axis, parts)


@dataclass(frozen=True)
class Curve:
    """Shares from 0 to 1 over sizes above 0."""

    name: str
    points: Sequence[tuple[int, float]]


def curves(title: str, axis: str, drawn: Sequence[Curve], marks: Mapping[int, str]) -> str:
    """Shares over sizes on a logarithmic axis; ``marks`` are labels of sizes."""
    sizes = [size for curve in drawn for size, _ in curve.points]
    low, high = min(sizes), max(max(sizes), min(sizes) + 1)
    across = lambda size: LEFT + FIELD_WIDTH * log(size / low) / log(high / low)  # noqa: E731
    parts = [_grid_line(share, f"{share:.0%}") for share in (n / GRID_LINES for n in range(GRID_LINES + 1))]
    size = 1
    while size <= high:
        if size >= low:
            parts.append(text(across(size), HEIGHT - BOTTOM + 16, f"{size:,}", "small middle"))
        size *= 4
    for n, (size, name) in enumerate(marks.items()):
        parts.append(_vertical_line(across(size), name, n) if low <= size <= high else "")
    for n, curve in enumerate(drawn):
        points = " ".join(f"{across(size):.1f},{_y(share):.1f}" for size, share in curve.points)
        parts.append(f'<polyline class="curve{n}" points="{points}"/>')
        parts.append(f'<rect class="key{n}" x="{LEFT + 10}" y="{TOP + 8 + 18 * n}" width="14" height="4"/>')
        parts.append(text(LEFT + 30, TOP + 14 + 18 * n, curve.name, "small"))
    return _svg(title, axis, parts)


def _y(share: float) -> float:
    return TOP + FIELD_HEIGHT * (1 - share)


def _grid_line(share: float, label: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
    return line + text(LEFT - 6, _y(share) + 4, label, "small end")


def _vertical_line(x: float, label: str = "", line_of_text: int = 0) -> str:
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + text(x - 4, HEIGHT - BOTTOM - 6 - LINE_HEIGHT * line_of_text, label, "small end")


def _svg(title: str, axis: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    named = [text(LEFT, 18, title, "title"), text(LEFT + FIELD_WIDTH / 2, HEIGHT - 8, axis, "small middle")]
    return "\n".join([head, *named, *parts, "</svg>"])
