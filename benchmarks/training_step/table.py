"""The figures of a comparison as text."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.training_step.case import SIZES, Case
from benchmarks.training_step.controller import Round, Worker

NAME_WIDTH, FIGURE_WIDTHS = 26, (28, 10, 10, 10)


def heading(case: Case, rounds: int) -> str:
    """Title with the settings of the comparison."""
    size = next((name for name, known in SIZES.items() if known == case.size), "its own")
    share = f"{case.supervised:.0%} supervised" if case.lengths == "full" else f"lengths like {case.lengths}"
    return f"{case.draft}, size {size}, {share}, {case.num_steps} step(s), {case.dtype}, {rounds} rounds"


def machine(threads: int) -> str:
    """Cores, CPU model and threads of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{os.cpu_count()} cores of {model}, {threads} thread(s)"


def figures(rounds: Sequence[Round], names: Sequence[str], reference: str, num_tokens: int) -> str:
    """One line per implementation: medians over the rounds, and the smallest and largest speed.

    Memory is the peak over all rounds, followed by its ratio to the reference's.
    """
    lines = [_line("", ["tokens/s (min to max)", "CPU s", "MB added", "share"], FIGURE_WIDTHS)]
    base_mb = rounds[-1][reference].added_mb
    for name in names:
        added_mb = rounds[-1][name].added_mb
        cells = [
            spread([num_tokens / r[name].seconds for r in rounds], "{:.0f}"),
            f"{statistics.median(r[name].cpu_seconds for r in rounds):.2f}",
            f"{added_mb:.0f}",
            f"{added_mb / base_mb:.2f}" if base_mb else "-",
        ]
        lines.append(_line(name, cells, FIGURE_WIDTHS))
    return "\n".join(lines)


def multiples(rounds: Sequence[Round], names: Sequence[str], references: Sequence[str]) -> str:
    """One line per implementation: the ratio of its speed to each reference's in the same round."""
    widths = [max(len(reference) + 2, 24) for reference in references]
    lines = [_line("times the tokens/s of", references, widths)]
    for name in names:
        ratios = ([r[reference].seconds / r[name].seconds for r in rounds] for reference in references)
        lines.append(_line(name, [spread(ratio, "{:.2f}") for ratio in ratios], widths))
    return "\n".join(lines)


def footnote(workers: Sequence[Worker], first: Round) -> str:
    """The first losses, the number of steps in a pass, and the versions of packages.

    Losses of different projects agree only roughly, as their conventions of masks and means differ.
    """
    losses = [f"{name} {measured.loss:.4f}" for name, measured in first.items() if measured.loss is not None]
    steps = [f"{worker.name} {worker.ready['steps']}" for worker in workers]
    versions = {f"{package} {number}" for worker in workers for package, number in worker.ready["versions"].items()}
    return "\n".join(
        f"{title}: {', '.join(values)}"
        for title, values in (("first losses", losses), ("steps in a pass", steps), ("versions", sorted(versions)))
    )


def spread(values: Sequence[float], form: str) -> str:
    """``median (smallest to largest)``."""
    median, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{median} ({low} to {high})"


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{name:{NAME_WIDTH}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
