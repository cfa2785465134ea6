"""Time for which saving a checkpoint pauses the training, asynchronously and synchronously.

python -m benchmarks.saving [--size M] [--rounds 5] [--threads N] [--out DIR]

The trainer's own checkpointer saves a small EAGLE-3 draft with AdamW's moments, alternating between both modes, to DIR
(default: a temporary directory).  An asynchronous save pauses the training until the state is copied to the host's
memory, a synchronous one until it is on the disk.  "pause" is the metric perf/save_pause_seconds; "written" the time
until the checkpoint has its name; "step" the slowdown of a training step while a thread writes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.processes import exit_status
from benchmarks.training_step.case import SIZES, Case, Setup
from benchmarks.training_step.implementations.own import CPU, Ours
from benchmarks.training_step.setup import write_setup
from benchmarks.training_step.table import machine
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import OptimizerConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.training.checkpointer import Checkpointer, ResumeMetadata, ResumeState
from nemo_speculative.training.optimizer import WeightAverage, build_optimizers, build_schedules

PLAIN_STEPS = 5


class Saved(Ours):
    """The trainer's components, with a checkpointer."""

    def __init__(self, setup: Setup, out: Path):
        super().__init__(setup, frozenset())
        config = OptimizerConfig()
        self.optimizer = build_optimizers(config, self.trainee)
        average = WeightAverage(self.trainee, None)
        schedules = build_schedules(config, self.optimizer, 1000)
        self.state = ResumeState(self.trainee, self.optimizer, schedules, average, CPU)
        draft = self.trainee.draft
        served = Provenance(str(setup.target), "", "float32", SpeculativeSettings(3, 1, 4), 0)

        def export(directory: Path, weights: dict[str, torch.Tensor], step: int) -> None:
            write_servable(directory, type(draft), weights, draft.shape, replace(served, step=step), torch.float32, {})

        start = ResumeMetadata(0, {}, {}, "", "")
        self.saver = Checkpointer(run=RunDirectory(out), keep=1, export=export, start=start, measure=None)
        self.saved = 0

    def timed_step(self) -> float:
        started = time.perf_counter()
        self.step(self.batches[0])
        return time.perf_counter() - started

    def save(self, wait: bool) -> tuple[float, float, list[float]]:
        """Saves a checkpoint; returns the seconds of the pause, until it has its name, and of each step in between."""
        figures: dict[str, float] = {}
        steps: list[float] = []
        self.saved += 1
        started = time.perf_counter()
        self.saver.begin(self.saved, self.state, {})
        while not (wait or self.saver.pending.written.done()):
            steps.append(self.timed_step())
        self.saver.finish(measure=False, before_publishing=figures.update)
        return figures["perf/save_pause_seconds"], time.perf_counter() - started, steps


def table(trainer: Saved, rounds: int) -> str:
    """Table of both modes, medians of ``rounds`` after a first pair of saves that is not counted."""
    plain = statistics.median(trainer.timed_step() for _ in range(PLAIN_STEPS))
    both = [(trainer.save(wait=True), trainer.save(wait=False)) for _ in range(rounds + 1)][1:]
    state = trainer.saver.run.path(trainer.saved) / "state"
    size = sum(file.stat().st_size for file in state.iterdir()) / 1e6
    lines = [f"{size:.0f} MB of state; a step takes {plain:.3f} s"]
    lines.append(f"{'':14}{'pause s':>10}{'written s':>12}{'step':>8}")
    pauses = []
    for name, saves in zip(("synchronous", "asynchronous"), zip(*both, strict=True), strict=True):
        pauses.append(statistics.median(pause for pause, _, _ in saves))
        written = statistics.median(seconds for _, seconds, _ in saves)
        during = [step for _, _, steps in saves for step in steps]
        slower = f"{statistics.median(during) / plain:.2f}x" if during else "-"
        lines.append(f"{name:14}{pauses[-1]:10.3f}{written:12.3f}{slower:>8}")
    return "\n".join([*lines, f"the asynchronous pause is {pauses[1] / pauses[0]:.2f} of the synchronous one"])


def _measure(size: str, rounds: int, threads: int, out: Path) -> None:
    torch.set_num_threads(threads)
    case = Case(
        size=SIZES[size], draft="eagle3", num_steps=3, dtype="float32", lengths="full", supervised=0.5, threads=threads
    )
    print(machine(threads))
    (out / "setup").mkdir()
    trainer = Saved(write_setup(out / "setup", case), out / "run")
    print(table(trainer, rounds), flush=True)
    trainer.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="M", help="(default: M)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--out", type=Path, default=None, help="a directory on the disk to measure")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        return exit_status(lambda: _measure(options.size, options.rounds, options.threads, Path(folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
