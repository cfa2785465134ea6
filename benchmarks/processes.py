"""Benchmarks whose cases are processes of their own, so that each one's memory is its own."""

import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks.training_step.controller import worker_environment
from nemo_speculative.utils.errors import UserError, print_error


def last_line_of(module: str, arguments: Sequence[str], threads: int, ranks: int = 1) -> str:
    """What ``python -m module`` printed last, run on so many ``ranks`` of ``threads`` each.

    Raises:
        UserError: it failed; the last line of its standard error is quoted.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        capture_output=True, text=True, check=False, env=worker_environment(threads),
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{module} {' '.join(arguments)}: the process failed: {said}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def exit_status(program: Callable[[], None]) -> int:
    """Of ``program``, whose :class:`UserError` is one line."""
    try:
        program()
    except UserError as error:
        print_error(error)
        return error.exit_code
    return 0
