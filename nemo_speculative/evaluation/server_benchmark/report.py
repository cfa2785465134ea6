"""The results of a benchmark as a Markdown table and as a heat map."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import log2

from nemo_speculative.evaluation.server_benchmark.results_log import BenchResult
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


def table(results: Iterable[BenchResult]) -> str:
    """Markdown table of the results with metrics, sorted by suite, temperature and concurrency, then fastest first.

    Times are in milliseconds, and medians unless a percentile is named.
    """
    measured = _sorted(results)
    return markdown_table(COLUMNS, [_row(result, baseline_of(result, measured)) for result in measured])


def _sorted(results: Iterable[BenchResult]) -> list[BenchResult]:
    def order(result: BenchResult) -> tuple[str, float, int, str, float]:
        point = result.point
        return point.suite, point.temperature, point.concurrency, point.comparison_key, -_speed(result)

    return sorted((result for result in results if result.metrics), key=order)


def baseline_of(result: BenchResult, results: Iterable[BenchResult]) -> BenchResult | None:
    """The result without speculation that ``result`` is compared with; None if there is none."""
    key = result.point.comparison_key
    return next((b for b in results if b.metrics and b.point.draft is None and b.point.comparison_key == key), None)


def best(results: Iterable[BenchResult], concurrency: int, temperature: float) -> BenchResult | None:
    """The draft's result with the most tokens/s at that concurrency and temperature."""
    candidates = [
        r
        for r in results
        if r.metrics and r.point.draft and (r.point.concurrency, r.point.temperature) == (concurrency, temperature)
    ]
    return max(candidates, key=_speed, default=None)


def _speed(result: BenchResult) -> float:
    return result.metrics.output_tokens_per_second if result.metrics else 0.0


def _row(result: BenchResult, baseline: BenchResult | None) -> tuple[str, ...]:
    point, metrics = result.point, result.metrics
    assert metrics is not None
    return (
        point.setting,
        point.suite,
        f"{point.temperature:g}",
        str(point.concurrency),
        f"{metrics.output_tokens_per_second:.1f}",
        _number(_speed(result) / _speed(baseline) if baseline else None, "x"),
        _number(metrics.tau),
        " ".join(f"{share:.2f}" for share in metrics.acceptance_per_position) or "-",
        _milliseconds(metrics.time_to_first_token, ("p50",)),
        _milliseconds(metrics.inter_token_latency, ("p50", "p95", "p99")),
        _milliseconds(metrics.latency, ("p50",)),
        _number(metrics.accuracy),
    )


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _milliseconds(percentiles: dict[str, float], names: Sequence[str]) -> str:
    return "/".join(f"{1000 * percentiles[name]:.1f}" for name in names) if percentiles else "-"


def heat_map(results: Iterable[BenchResult]) -> str:
    """An SVG document with a panel for each suite and temperature: rows are settings, columns are concurrencies.

    A field shows the speed-up over the baseline and tokens/s; without a baseline it is white.
    """
    measured = _sorted(results)
    panels = [list(group) for _, group in groupby(measured, key=lambda r: (r.point.suite, r.point.temperature))]
    parts, top, width = [], 0, 0
    for panel in panels:
        text, right, bottom = _panel(panel, measured, top)
        parts.append(text)
        top, width = bottom, max(width, right)
    size = f'width="{width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {top}">'
    return "\n".join([head, f"<style>{svg.STYLE}</style>", f'<rect {size} fill="#fff"/>', *parts, "</svg>", ""])


def _panel(panel: Sequence[BenchResult], measured: Sequence[BenchResult], top: int) -> tuple[str, int, int]:
    """One panel's text, and its right and bottom edges."""
    columns = sorted({result.point.concurrency for result in panel})
    settings = sorted({result.point.setting for result in panel}, key=_setting_order)
    title = f"{panel[0].point.suite}, temperature {panel[0].point.temperature:g}: speed-up and tokens/s"
    parts = [
        svg.text(12, top + 22, title, "title"),
        svg.text(12, top + TOP - 8, "steps-topk-tokens", "small"),
    ]
    parts += [
        svg.text(LEFT + WIDTH * (i + 0.5), top + TOP - 8, f"{n} at once", "middle") for i, n in enumerate(columns)
    ]
    parts += [svg.text(12, top + TOP + HEIGHT * (j + 0.6), setting) for j, setting in enumerate(settings)]
    for result in panel:
        x = LEFT + WIDTH * columns.index(result.point.concurrency)
        y = top + TOP + HEIGHT * settings.index(result.point.setting)
        baseline = baseline_of(result, measured)
        parts.append(_field(x, y, _speed(result), _speed(result) / _speed(baseline) if baseline else None))
    right = max(LEFT + WIDTH * len(columns), LETTER * len(title)) + 16
    return "\n".join(parts), right, top + TOP + HEIGHT * len(settings) + 16


def _field(x: int, y: int, speed: float, speed_up: float | None) -> str:
    lines, fill = [(f"{speed:.1f}", 0.6, "middle")], "#fff"
    if speed_up is not None:
        lines, fill = [(f"{speed_up:.2f}x", 0.45, "middle"), (f"{speed:.1f}", 0.82, "small middle")], _color(speed_up)
    box = f'<rect x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" fill="{fill}" stroke="#ddd"/>'
    return box + "".join(svg.text(x + WIDTH / 2, y + HEIGHT * down, text, classes) for text, down, classes in lines)


def _color(speed_up: float) -> str:
    share = min(abs(log2(speed_up)) / FULL_COLOR, 1.0)
    end = svg.GOOD if speed_up > 1 else svg.BAD
    # At most three quarters of the way, so that dark letters stay readable.
    mixed = [round(a + (b - a) * share * 0.75) for a, b in zip(NEUTRAL, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _setting_order(setting: str) -> list[int]:
    return [] if setting == "baseline" else [int(number) for number in setting.split("-")]
