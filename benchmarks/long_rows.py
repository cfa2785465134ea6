"""Memory of a training step as a function of the row length.

python -m benchmarks.long_rows [--lengths 2048,4096,8192,16384,32768] [--threads N]

A small random target and its EAGLE-3 draft train on one row, a single conversation of which half is supervised: the
worst case of attention.  Each length runs in its own process.  "target" is the peak in the target's forward, minus the
process's memory before it; "step" is that of target, draft, loss, backward pass, clipping and AdamW.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import exit_status, last_line_of
from benchmarks.training_step.case import Case, Size
from benchmarks.training_step.table import machine

MODULE = "benchmarks.long_rows"
LENGTHS = "2048,4096,8192,16384,32768"
STEPS = 3


def case_of(length: int) -> Case:
    """One row of ``length`` tokens."""
    size = Size(
        hidden_size=64, num_layers=7, num_heads=2, num_kv_heads=1, intermediate_size=192, vocab_size=1024,
        draft_vocab_size=512, aux_layers=[1, 2, 3], rows=1, row_tokens=length,
    )  # fmt: skip
    return Case(size=size, draft="eagle3", num_steps=STEPS, dtype="float32", lengths="full", supervised=0.5, threads=1)


def prepare(folder: Path, length: int) -> None:
    """Writes target, draft and conversation."""
    from benchmarks.training_step.setup import write_setup

    write_setup(folder, case_of(length))


def measure(folder: Path) -> dict[str, float]:
    """Peak MB that the row in ``folder`` adds to this process."""
    from benchmarks.training_step.case import Setup
    from benchmarks.training_step.implementations.own import Ours
    from benchmarks.training_step.worker import Memory

    ours = Ours(Setup(folder), frozenset())
    memory = Memory()
    ours.target.compute_hidden_states(ours.batches[0])
    target = memory.added_mb()
    ours.step(ours.batches[0])
    ours.close()
    return {"target": target, "step": memory.added_mb()}


def _table(lengths: Sequence[int], threads: int) -> None:
    print(machine(threads))
    print(f"{'tokens':>8}{'target MB':>12}{'step MB':>12}{'target MB / 1k':>18}{'step MB / 1k':>15}")
    for length in lengths:
        with tempfile.TemporaryDirectory() as name:
            for_length = ["--lengths", str(length)]
            last_line_of(MODULE, [*for_length, "--prepare", name], threads)
            peak = json.loads(last_line_of(MODULE, [*for_length, "--within", name], threads))
        target, step = peak["target"], peak["step"]
        print(
            f"{length:8}{target:12.0f}{step:12.0f}{target / length * 1000:18.1f}{step / length * 1000:15.1f}",
            flush=True,
        )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default=LENGTHS, help=f"tokens of a row (default: {LENGTHS})")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    for internal in ("--prepare", "--within"):
        parser.add_argument(internal, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    lengths = [int(n) for n in options.lengths.split(",")]
    if options.prepare:
        prepare(options.prepare, lengths[0])
    elif options.within:
        print(json.dumps(measure(options.within)))
    else:
        return exit_status(lambda: _table(lengths, options.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
