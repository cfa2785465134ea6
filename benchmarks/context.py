"""Memory that one training step of a long row adds to each rank, where ranks share its tokens.

python -m benchmarks.context [--length 16384] [--ranks 1,2,4] [--threads N]

Target, draft and row are those of :mod:`benchmarks.long_rows`; "target" and "step" are what they are there, of the rank
that takes most.  "of one" is the share of what a rank alone takes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import long_rows
from benchmarks.processes import exit_status, last_line_of, last_lines_of
from benchmarks.training_step.table import machine

MODULE = "benchmarks.context"


def _table(length: int, counts: Sequence[int], threads: int) -> None:
    print(machine(threads))
    print(f"{'ranks':>6}{'target MB':>12}{'of one':>9}{'step MB':>12}{'of one':>9}")
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        of_length = ["--lengths", str(length)]
        last_line_of(long_rows.MODULE, [*of_length, "--prepare", name], threads)
        for ranks in counts:
            lines = last_lines_of(long_rows.MODULE, [*of_length, "--within", name], threads, ranks)
            found = [json.loads(line) for line in lines]
            most = {part: max(rank[part] for rank in found) for part in ("target", "step")}
            alone = alone or most
            columns = "".join(f"{most[part]:12.0f}{most[part] / alone[part]:9.2f}" for part in most)
            print(f"{ranks:6}{columns}", flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=16384, help="tokens of the row (default: 16384)")
    parser.add_argument("--ranks", default="1,2,4", help="how many share it, one after the other (default: 1,2,4)")
    parser.add_argument("--threads", type=int, default=1, help="of each rank (default: 1)")
    options = parser.parse_args(argv)
    counts = [int(n) for n in options.ranks.split(",")]
    return exit_status(lambda: _table(options.length, counts, options.threads))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
