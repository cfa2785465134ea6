"""Time and memory of one training step, ours beside the textbook's and the peers' own, in turn on one machine.

python -m benchmarks.training_step [--size S|M] [--supervised 0.5] [--rounds 7]     (make bench ARGS="--size M")

A step is the target's forward, the supervision, the draft's forward and loss, backward, clipping and AdamW.  Every
implementation lives in a process of its own and is asked for one pass over the same conversations in turn; all start
from the same weights.  Tokens/s count the tokens of the conversations, not the padding; CPU seconds are a pass's, of
all threads; "MB added" is a process's peak over its resident set before the first step, "share" is that beside the
first reference's.  "target" is the target's forward alone; "medium" is torch's float32 matmul precision, "geometric"
draft.depth_sampling, "packed" AutoModel's own packing.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.training_step.cli import Comparison, parse
from benchmarks.training_step.controller import Worker, interleave, worker_environment
from benchmarks.training_step.registry import Chosen
from benchmarks.training_step.table import figures, footnote, heading, machine, multiples
from nemo_speculative.utils.errors import UserError, print_error
from nemo_speculative.utils.progress import Progress, quiet_transformers


def main(argv: Sequence[str]) -> int:
    """Prints the rows that ``argv`` asks for; returns the exit status: 1 if one failed, 2 if none was started."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        comparisons = parse(argv, __doc__)
    except UserError as error:
        return _fail(error)
    status = 0
    for comparison in comparisons:
        try:
            print(f"{compare(comparison)}\n", flush=True)
        except UserError as error:
            status = _fail(error)
    return status


def compare(comparison: Comparison) -> str:
    """The table of one comparison.

    Raises:
        UserError: the process of an implementation ended.
    """
    # Costs seconds to import, and a command line may be refused.
    from benchmarks.training_step.setup import write_setup

    quiet_transformers()
    case, names = comparison.case, [chosen.text for chosen in comparison.chosen]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        setup = write_setup(Path(folder), case)
        workers = [stack.enter_context(start(chosen, comparison, Path(folder))) for chosen in comparison.chosen]
        for worker in workers:
            worker.wait_until_ready()
        title = heading(case, comparison.rounds)
        progress = Progress(title, comparison.warmup + comparison.rounds)
        first, *rest = interleave(workers, comparison.warmup + comparison.rounds, progress.advance)
        progress.close()
        counted = rest[comparison.warmup - 1 :]
        return "\n".join(
            [
                title,
                f"{machine(case.threads)}; {setup.num_tokens} tokens a pass",
                figures(counted, names, comparison.references[0], setup.num_tokens),
                multiples(counted, names, comparison.references),
                footnote(workers, first),
            ]
        )


def start(chosen: Chosen, comparison: Comparison, folder: Path) -> Worker:
    """The process of an implementation, in its environment."""
    python = str(comparison.peers_python if chosen.known.peer else sys.executable)
    command = [python, "-m", "benchmarks.training_step.worker", chosen.text, str(folder)]
    return Worker(chosen.text, command, folder / f"{chosen.text}.log", worker_environment(comparison.case.threads))


def _fail(error: UserError) -> int:
    print_error(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
