"""The results of a benchmark as a Markdown table and as a heat map."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import log2

from nemo_speculative.evaluation.server_benchmark.results import BenchResult
from nemo_speculative.utils import svg
from nemo_speculative.utils.tables import markdown_table

COLUMNS = ("setting", "suite", "temperature", "at once", "tokens/s", "speed-up", "tau", "accepted by depth",
           "first token ms", "inter-token ms p50/p95/p99", "latency ms", "accuracy")  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP = 108, 44, 132, 64
"""Pixels of a field, and of the space left of and above the fields of a panel."""
LETTER = 8
"""Maximum width of a title's letter in pixels."""
NEUTRAL = (247, 247, 244)
"""Color of a speed-up of 1."""
FULL_COLOR = 1.6
"""log2 of the speed-up, or slow-down, that gets the full color."""


def best(results: Iterable[BenchResult], concurrency: int, temperature: float) -> BenchResult | None:
    """The draft's result with the most tokens/s at that concurrency and temperature."""
    drafts = [r for r in results if r.metrics and r.point.draft]
    candidates = [r for r in drafts if (r.point.concurrency, r.point.temperature) == (concurrency, temperature)]
    return max(candidates, key=_speed, default=None)


def _speed(result: BenchResult) -> float:
    return result.metrics.output_tokens_per_second if result.metrics else 0.0


def _with_speed_ups(results: Iterable[BenchResult]) -> list[tuple[BenchResult, float | None]]:
    """The results with metrics, sorted, with their speed-up over the baseline at the same point; None without one."""

    def order(result: BenchResult) -> tuple[str, float, int, str, float]:
        point = result.point
        return point.suite, point.temperature, point.concurrency, point.comparison_key, -_speed(result)

    measured = sorted((result for result in results if result.metrics), key=order)
    baselines = {r.point.comparison_key: _speed(r) for r in measured if r.point.draft is None}
    speeds = [(result, baselines.get(result.point.comparison_key)) for result in measured]
    return [(result, _speed(result) / baseline if baseline else None) for result, baseline in speeds]


def table(results: Iterable[BenchResult]) -> str:
    """Markdown table of the results with metrics, sorted by suite, temperature and concurrency, then fastest first.

    Times are in milliseconds, and medians unless a percentile is named.
    """
    return markdown_table(COLUMNS, [_row(result, speed_up) for result, speed_up in _with_speed_ups(results)])


def _row(result: BenchResult, speed_up: float | None) -> tuple[str, ...]:
    point, metrics = result.point, result.metrics
    assert metrics is not None
    return (
        point.setting,
        point.suite,
        f"{point.temperature:g}",
        str(point.concurrency),
        f"{metrics.output_tokens_per_second:.1f}",
        "-" if speed_up is None else f"{speed_up:.2f}x",
        "-" if metrics.tau is None else f"{metrics.tau:.2f}",
        " ".join(f"{share:.2f}" for share in metrics.acceptance_per_position) or "-",
        _milliseconds(metrics.time_to_first_token, "p50"),
        _milliseconds(metrics.inter_token_latency, "p50", "p95", "p99"),
        _milliseconds(metrics.latency, "p50"),
        "-" if metrics.accuracy is None else f"{metrics.accuracy:.2f}",
    )


def _milliseconds(percentiles: dict[str, float], *names: str) -> str:
    return "/".join(f"{1000 * percentiles[name]:.1f}" for name in names) if percentiles else "-"


def heat_map(results: Iterable[BenchResult]) -> str:
    """An SVG document with a panel for each suite and temperature: rows are settings, columns are concurrencies.

    A field shows the speed-up over the baseline and tokens/s; without a baseline it is white.
    """
    parts, top, width = [], 0, 0
    for _, panel in groupby(_with_speed_ups(results), key=lambda r: (r[0].point.suite, r[0].point.temperature)):
        text, right, top = _panel(list(panel), top)
        parts.append(text)
        width = max(width, right)
    size = f'width="{width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {top}">'
    return "\n".join([head, f"<style>{svg.STYLE}</style>", f'<rect {size} fill="#fff"/>', *parts, "</svg>", ""])


def _panel(panel: Sequence[tuple[BenchResult, float | None]], top: int) -> tuple[str, int, int]:
    """One panel's text, and its right and bottom edges."""
    points = [result.point for result, _ in panel]
    columns = sorted({point.concurrency for point in points})
    # The baseline first, then by steps, top-k and tokens.
    numbers = {point.setting: list(point.draft["speculative"].values()) if point.draft else [] for point in points}
    settings = sorted(numbers, key=lambda setting: numbers[setting])
    title = f"{points[0].suite}, temperature {points[0].temperature:g}: speed-up and tokens/s"
    parts = [svg.text(12, top + 22, title, "title"), svg.text(12, top + TOP - 8, "steps-topk-tokens", "small")]
    for i, concurrency in enumerate(columns):
        parts.append(svg.text(LEFT + WIDTH * (i + 0.5), top + TOP - 8, f"{concurrency} at once", "middle"))
    for j, setting in enumerate(settings):
        parts.append(svg.text(12, top + TOP + HEIGHT * (j + 0.6), setting))
    for result, speed_up in panel:
        x = LEFT + WIDTH * columns.index(result.point.concurrency)
        y = top + TOP + HEIGHT * settings.index(result.point.setting)
        fill, shown = ("#fff", "-") if speed_up is None else (_color(speed_up), f"{speed_up:.2f}x")
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" fill="{fill}" stroke="#ddd"/>',
            svg.text(x + WIDTH / 2, y + HEIGHT * 0.45, shown, "middle"),
            svg.text(x + WIDTH / 2, y + HEIGHT * 0.82, f"{_speed(result):.1f}", "small middle"),
        ]
    right = max(LEFT + WIDTH * len(columns), LETTER * len(title)) + 16
    return "\n".join(parts), right, top + TOP + HEIGHT * len(settings) + 16


def _color(speed_up: float) -> str:
    share = min(abs(log2(speed_up)) / FULL_COLOR, 1.0)
    end = svg.GOOD if speed_up > 1 else svg.BAD
    # At most three quarters of the way, so that dark letters stay readable.
    return "#{:02x}{:02x}{:02x}".format(*(round(a + (b - a) * share * 0.75) for a, b in zip(NEUTRAL, end, strict=True)))
