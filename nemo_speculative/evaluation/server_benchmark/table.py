"""Cells side by side."""

from collections.abc import Iterable, Sequence

from nemo_speculative.evaluation.server_benchmark.results_log import Measured

HEAD = ("setting", "suite", "temperature", "at once", "tokens/s", "speed-up", "tau", "accepted by depth",
        "first token ms", "inter-token ms p50/p95/p99", "latency ms", "accuracy")  # fmt: skip


def table(cells: Iterable[Measured]) -> str:
    """The measured cells as Markdown: by suite, temperature and concurrency, there the fastest first.

    Times are in milliseconds, and medians where no percentile is named.
    """
    measured = [cell for cell in cells if cell.figures]
    rows = [HEAD, tuple("---" for _ in HEAD), *(_row(one, baseline_of(one, measured)) for one in in_order(measured))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(
        f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in rows
    )


def in_order(measured: Sequence[Measured]) -> list[Measured]:
    """By suite, temperature and concurrency; there by tokens/s, the most first."""
    return sorted(
        measured,
        key=lambda one: (one.cell.suite, one.cell.temperature, one.cell.concurrency, one.cell.rivals, -_speed(one)),
    )


def baseline_of(one: Measured, measured: Iterable[Measured]) -> Measured | None:
    """The cell without speculation that ``one`` is compared with; None: there is none."""
    rivals = one.cell.rivals
    return next((b for b in measured if b.figures and b.cell.draft is None and b.cell.rivals == rivals), None)


def speed_up(one: Measured, measured: Iterable[Measured]) -> float | None:
    """Tokens/s over those of the baseline."""
    baseline = baseline_of(one, measured)
    return _speed(one) / _speed(baseline) if baseline else None


def best(cells: Iterable[Measured], concurrency: int, temperature: float) -> Measured | None:
    """The draft's cell with the most tokens/s at that concurrency and temperature."""
    found = [
        one
        for one in cells
        if one.figures and one.cell.draft and (one.cell.concurrency, one.cell.temperature) == (concurrency, temperature)
    ]
    return max(found, key=_speed, default=None)


def _speed(one: Measured) -> float:
    return one.figures.output_tokens_per_second if one.figures else 0.0


def _row(one: Measured, baseline: Measured | None) -> tuple[str, ...]:
    cell, figures = one.cell, one.figures
    assert figures is not None
    return (
        cell.setting,
        cell.suite,
        f"{cell.temperature:g}",
        str(cell.concurrency),
        f"{figures.output_tokens_per_second:.1f}",
        _number(_speed(one) / _speed(baseline) if baseline else None, "x"),
        _number(figures.tau),
        " ".join(f"{share:.2f}" for share in figures.acceptance_per_position) or "-",
        _milliseconds(figures.time_to_first_token, ("p50",)),
        _milliseconds(figures.inter_token_latency, ("p50", "p95", "p99")),
        _milliseconds(figures.latency, ("p50",)),
        _number(figures.accuracy),
    )


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _milliseconds(percentiles: dict[str, float], names: Sequence[str]) -> str:
    return "/".join(f"{1000 * percentiles[name]:.1f}" for name in names) if percentiles else "-"
