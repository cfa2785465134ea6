"""Helpers of benchmarks that run each case in its own process, to measure its memory separately."""

import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks.training_step.controller import worker_environment
from nemo_speculative.utils.errors import UserError, print_error


def last_line_of(module: str, arguments: Sequence[str], threads: int, ranks: int = 1) -> str:
    """Runs ``python -m module`` on ``ranks`` ranks of ``threads`` threads each; returns the last line that it prints.

    Raises:
        UserError: it failed; the message quotes the last line of its standard error.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        capture_output=True, text=True, check=False, env=worker_environment(threads),
    )  # fmt: skip
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{module} {' '.join(arguments)}: the process failed: {message}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def exit_status(program: Callable[[], None]) -> int:
    """Runs ``program`` and returns its exit status; prints a :class:`UserError` as one line."""
    try:
        program()
    except UserError as error:
        print_error(error)
        return error.exit_code
    return 0
