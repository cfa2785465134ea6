"""Time and memory of one training step: ours compared with the dense reference and other projects' trainers.

python -m benchmarks.training_step [--size S|M] [--supervised 0.5] [--rounds 7]     (make bench ARGS="--size M")

A step consists of the target's forward, the labels, the draft's forward and loss, backward, clipping and AdamW.  Every
implementation runs in its own process; in each round, each makes one pass over the same conversations, one after the
other.  All start from the same weights.  Tokens/s count the tokens of the conversations without padding; CPU seconds
are those of a pass, of all threads; "MB added" is the peak of a process minus its resident set before the first step,
"share" the ratio to the first reference's.  "target" is the target's forward alone, "textbook" the dense reference;
"medium" is torch's float32 matmul precision, "geometric" draft.depth_sampling, "packed" AutoModel's own packing.
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
    """Prints the tables selected by ``argv``; returns the exit status: 1 if one failed, 2 for a wrong command line."""
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
    """Runs one comparison and returns its table.

    Raises:
        UserError: the process of an implementation ended.
    """
    # Imported only for a valid command line, as it takes seconds.
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
    """Starts the process of an implementation, with the Python of its environment."""
    python = str(comparison.peers_python if chosen.known.peer else sys.executable)
    command = [python, "-m", "benchmarks.training_step.worker", chosen.text, str(folder)]
    return Worker(chosen.text, command, folder / f"{chosen.text}.log", worker_environment(comparison.case.threads))


def _fail(error: UserError) -> int:
    print_error(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
