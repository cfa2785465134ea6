"""Time of the phases of one of our training steps, and the speed of its matrix products.

    python -m benchmarks.training_step.profile --size M --supervised 1

Milliseconds of wall time in the training thread, medians of several steps.  The time of a phase excludes phases inside
it; "products" are torch's matrix products (without those of the flash attention kernel).
"""

import argparse
import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.processes import exit_status
from benchmarks.training_step.case import SIZES, Setup
from benchmarks.training_step.cli import parse
from benchmarks.training_step.implementations.base import Trainer
from benchmarks.training_step.implementations.own import Ours
from benchmarks.training_step.setup import write_setup
from benchmarks.training_step.table import machine
from nemo_speculative.algorithms.common import attention, ttt
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.hf import TransformersTarget

PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}
"""Operators of matrix products, with the position of the first factor among their arguments; the second follows."""
WARMUP = 2
REST = "draft: projections, MLP, norms"
PHASES: dict[str, tuple[Any, str]] = {
    "target: layers": (TransformersTarget, "compute_hidden_states"),
    "target: head, for the labels": (Target, "logits"),
    "draft: attention, forward": (attention._PieceAttention, "forward"),
    "draft: attention, backward": (attention._PieceAttention, "backward"),
    "draft: head and loss, with gradients": (ttt, "chunked_linear_loss"),
    "clipping and AdamW": (Trainer, "update"),
}


@dataclass
class PhaseTime:
    """Time of a phase in one step, and of its matrix products."""

    ms: float = 0.0
    products_ms: float = 0.0
    products_flops: float = 0.0

    def __add__(self, other: "PhaseTime") -> "PhaseTime":
        return PhaseTime(
            self.ms + other.ms, self.products_ms + other.products_ms, self.products_flops + other.products_flops
        )


@contextmanager
def named_phases() -> Iterator[None]:
    """Within, the profiler records every phase under its name."""
    with ExitStack() as stack:
        for name, (owner, attribute) in PHASES.items():
            function = _named(name, getattr(owner, attribute))
            static = isinstance(vars(owner)[attribute], staticmethod)
            stack.enter_context(patch.object(owner, attribute, staticmethod(function) if static else function))
        yield


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def phase_times(step: Callable[[], Any]) -> dict[str, PhaseTime]:
    """Runs ``step`` within :func:`named_phases`, and returns the time of each phase."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled, record_function(REST):
        step()
    times: dict[str, PhaseTime] = defaultdict(PhaseTime)
    for event in profiled.events():
        if phase := _phase(event):
            ms = event.self_cpu_time_total / 1e3
            product = event.name in PRODUCTS
            times[phase] += PhaseTime(ms, ms, flops(event.name, event.input_shapes)) if product else PhaseTime(ms)
    return times


def profiled_steps(setup: Setup, count: int) -> list[dict[str, PhaseTime]]:
    """Phase times of ``count`` steps of ours on the first batch of ``setup``."""
    with named_phases(), closing(Ours(setup, frozenset())) as ours:
        return [phase_times(lambda: ours.step(ours.batches[0])) for _ in range(count)]


def _phase(event: Any) -> str | None:
    while event is not None and event.name not in PHASES and event.name != REST:
        event = event.cpu_parent
    return None if event is None else event.name


def flops(product: str, shapes: Sequence[Sequence[int]]) -> float:
    """FLOPs of one of ``PRODUCTS``, [.., n, k] by [.., k, m], from the shapes of its arguments."""
    first, second = shapes[PRODUCTS[product] :][:2]
    return 2.0 * math.prod(first) * second[-1]


def table(steps: Sequence[dict[str, PhaseTime]]) -> list[str]:
    """Lines of the table: one per phase, and the whole step."""
    lines = [f"{'':38}{'ms':>8}{'products':>10}{'GFLOP/s of them':>18}"]
    for name in (*PHASES, REST):
        lines.append(_line(name, [step[name] for step in steps]))
    return [*lines, _line("step", [sum(step.values(), PhaseTime()) for step in steps])]


def _line(name: str, times: Sequence[PhaseTime]) -> str:
    ms, products = (statistics.median(getattr(time, key) for time in times) for key in ("ms", "products_ms"))
    speed = f"{times[0].products_flops / products / 1e6:18.0f}" if products else ""
    return f"{name:38}{ms:8.0f}{products:10.0f}{speed}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step.profile", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--supervised", default="0.5")
    parser.add_argument("--steps", default="7", help="steps of the unroll (default: 7)")
    parser.add_argument("--rounds", type=int, default=7, help="training steps, after two of warm-up (default: 7)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    options = parser.parse_args(argv)
    row = f"--size {options.size} --supervised {options.supervised} --steps {options.steps} --implementations ours"
    (comparison,) = parse([*row.split(), "--threads", str(options.threads)])
    torch.set_num_threads(options.threads)
    print(f"{machine(options.threads)}; {row}")
    with tempfile.TemporaryDirectory() as folder:
        steps = profiled_steps(write_setup(Path(folder), comparison.case), WARMUP + options.rounds)
    print("\n".join(table(steps[WARMUP:])))


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
