"""The report as one self-contained HTML page, in light and dark colors, with its plots as SVG."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from math import log
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.inspect_data.survey import COVERAGE_BINS
from nemo_speculative.utils import svg

MAX_TURNS = 30
MAX_SHOWN_TOKENS = 4096
WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 44
"""Margins in pixels."""
FIELD_WIDTH, FIELD_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
GRID = (0, 0.25, 0.5, 0.75, 1)
"""Heights of the horizontal lines, as shares of the field."""
MAX_LABELS = 12
MAX_BAR_WIDTH = 80


def _percent(share: float, digits: int = 2) -> str:
    return f"{share:.{digits}%}"


def _quote(tokens: Sequence[str]) -> str:
    return " ".join(map(repr, tokens))


JINJA = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
JINJA.filters |= {"comma": "{:,}".format, "percent": _percent, "quote": _quote}


def page(figures: dict[str, Any], rows: Sequence[TokenRow], tokenizer: Any, title: str) -> str:
    """The HTML of ``figures``, which include the comparison; it shows ``rows``, which are not truncated."""
    good, bad = ("#{:02x}{:02x}{:02x}".format(*color) for color in (svg.GOOD, svg.BAD))
    return JINJA.get_template("report.html").render(
        title=title,
        f=figures,
        good=good,
        bad=bad,
        svg_style=Markup(svg.STYLE),
        plots=map(Markup, _plots(figures)),
        vocabulary_sources=sorted({name for row in figures["vocabulary"]["table"] for name in row["sources"] if name}),
        conversations=[Markup(conversation(row, tokenizer, figures["max_length"])) for row in rows],
    )


def conversation(row: TokenRow, tokenizer: Any, max_length: int) -> str:
    """The HTML of ``row``'s text: supervised tokens are marked, those after ``max_length`` crossed out."""
    limit = min(len(row.input_ids), MAX_SHOWN_TOKENS)
    spans, start = [], 0
    for (cut, supervised), run in groupby((n >= max_length, row.loss_mask[n]) for n in range(limit)):
        end = start + len(list(run))
        spans.append((cut, supervised, tokenizer.decode(row.input_ids[start:end])))
        start = end
    return JINJA.get_template("conversation.html").render(row=row, spans=spans, more=len(row.input_ids) - limit)


def _plots(figures: dict[str, Any]) -> Iterator[str]:
    lengths = figures["lengths"]["histogram"]
    mark = next((n for n, (edge, _) in enumerate(lengths) if edge >= figures["max_length"]), None)
    yield bars("Length of conversations", "tokens, from", [(f"{edge:,}", n) for edge, n in lengths], mark)
    coverage = figures["coverage_histogram"]
    coverage = [*coverage, *[0] * (COVERAGE_BINS - len(coverage))]
    shares = [(f"{100 * bin // COVERAGE_BINS}%", count) for bin, count in enumerate(coverage)]
    yield bars("Supervised share", "of a conversation's tokens, from", shares)
    turns = figures["turns"]
    last = min(max(turns, default=0), MAX_TURNS)
    counts = [(str(n), turns.get(n, 0)) for n in range(1, last + 1)]
    if more := sum(count for n, count in turns.items() if n > last):
        counts.append((f">{last}", more))
    yield bars("Answers in a conversation", "answers", counts)
    if curve := figures["vocabulary"]["curve"]:
        sides = {"training": "training", "held_out": "held out, by the same ids"}
        drawn = {
            name: [(point["entries"], point[side]) for point in curve]
            for side, name in sides.items()
            if side in curve[0]
        }
        marks: dict[int, str] = {}
        for share, entries in figures["vocabulary"]["reach"].items():
            marks[entries] = f"{marks[entries]}, {float(share):.1%}" if entries in marks else f"{float(share):.1%}"
        yield curves("Draft vocabulary: share of supervised tokens", "entries", drawn, marks)


def bars(title: str, axis: str, counts: Sequence[tuple[str, float]], mark: int | None = None) -> str:
    """A bar for each label, with a vertical line at the left edge of bar ``mark``."""
    most = max((value for _, value in counts), default=0) or 1
    step = min(FIELD_WIDTH / max(len(counts), 1), MAX_BAR_WIDTH)
    every = -(-len(counts) // MAX_LABELS)
    parts = []
    for n, (label, value) in enumerate(counts):
        x, tall = LEFT + n * step, FIELD_HEIGHT * value / most
        box = f'x="{x + step * 0.08:.1f}" y="{_y(value / most):.1f}" width="{step * 0.84:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(label)}: {value:,.0f}</title></rect>')
        if n % every == 0:
            parts.append(svg.text(x + step / 2, HEIGHT - BOTTOM + 16, label, "small middle"))
    if mark is not None:
        parts.append(_vertical_line(LEFT + mark * step))
    return _svg(title, axis, [f"{most * share:,.0f}" for share in GRID], parts)


def curves(title: str, axis: str, drawn: Mapping[str, Sequence[tuple[int, float]]], marks: Mapping[int, str]) -> str:
    """Curves of (size, share) points by name, with sizes on a logarithmic axis; ``marks`` are labels of sizes."""
    sizes = [size for points in drawn.values() for size, _ in points]
    low, high = min(sizes), max(max(sizes), min(sizes) + 1)

    def across(size: int) -> float:
        return LEFT + FIELD_WIDTH * log(size / low) / log(high / low)

    parts = []
    for size in (4**n for n in range(16)):
        if low <= size <= high:
            parts.append(svg.text(across(size), HEIGHT - BOTTOM + 16, f"{size:,}", "small middle"))
    for n, (size, label) in enumerate(marks.items()):
        if low <= size <= high:
            parts.append(_vertical_line(across(size)))
            parts.append(svg.text(across(size) - 4, HEIGHT - BOTTOM - 6 - 16 * n, label, "small end"))
    for n, (name, points) in enumerate(drawn.items()):
        line = " ".join(f"{across(size):.1f},{_y(share):.1f}" for size, share in points)
        parts.append(f'<polyline class="curve{n}" points="{line}"/>')
        parts.append(f'<rect class="key{n}" x="{LEFT + 10}" y="{TOP + 8 + 18 * n}" width="14" height="4"/>')
        parts.append(svg.text(LEFT + 30, TOP + 14 + 18 * n, name, "small"))
    return _svg(title, axis, [f"{share:.0%}" for share in GRID], parts)


def _y(share: float) -> float:
    return TOP + FIELD_HEIGHT * (1 - share)


def _vertical_line(x: float) -> str:
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _svg(title: str, axis: str, grid_labels: Sequence[str], parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    lines = [svg.text(LEFT, 18, title, "title"), svg.text(LEFT + FIELD_WIDTH / 2, HEIGHT - 8, axis, "small middle")]
    for share, label in zip(GRID, grid_labels, strict=True):
        y = f"{_y(share):.1f}"
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(svg.text(LEFT - 6, _y(share) + 4, label, "small end"))
    return "\n".join([head, *lines, *parts, "</svg>"])
