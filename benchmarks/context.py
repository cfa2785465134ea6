"""Memory of a training step of a long row whose tokens several ranks share.

python -m benchmarks.context [--length 16384] [--ranks 1,2,4] [--threads N]

Target, draft and row are those of :mod:`benchmarks.long_rows`: a small model, and one conversation of which half is
supervised.  MB are the peak of tensors on the rank with the highest one, without weights, by torch's profiler: "target"
in the target's forward, "step" in a whole step after the first.  "of one" is the ratio to a single rank.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.long_rows import prepare
from benchmarks.processes import exit_status, last_line_of
from benchmarks.training_step.table import machine

MODULE = "benchmarks.context"


def measure(folder: Path) -> dict[str, float]:
    """Peak MB of the row in ``folder``, on the rank with the highest one."""
    import torch

    from benchmarks.training_step.case import Setup
    from benchmarks.training_step.implementations.own import CPU, Ours
    from benchmarks.training_step.worker import peak_of_tensors

    ours = Ours(Setup(folder), frozenset())
    (whole,) = ours.batches
    batch = ours.objective.schedule(whole, CPU).batch
    target = peak_of_tensors(lambda: ours.target.compute_hidden_states(batch))
    ours.step(whole)
    step = peak_of_tensors(lambda: ours.step(whole))
    most = torch.tensor([target, step]) / 1e6
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    ours.close()
    return {"target": float(most[0]), "step": float(most[1])}


def _table(length: int, counts: Sequence[int], threads: int) -> None:
    print(machine(threads))
    print(f"{'ranks':>6}{'target MB':>12}{'of one':>9}{'step MB':>12}{'of one':>9}")
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), length)
        for ranks in counts:
            most = json.loads(last_line_of(MODULE, ["--within", name], threads, ranks))
            alone = alone or most
            columns = "".join(f"{most[part]:12.0f}{most[part] / alone[part]:9.2f}" for part in most)
            print(f"{ranks:6}{columns}", flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=16384, help="tokens of the row (default: 16384)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks that share the row (default: 1,2,4)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank (default: 1)")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.within:
        print(json.dumps(measure(options.within)))
        return 0
    counts = [int(n) for n in options.ranks.split(",")]
    return exit_status(lambda: _table(options.length, counts, options.threads))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
