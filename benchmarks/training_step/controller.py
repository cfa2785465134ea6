"""Worker processes that run one pass each in turn, so that noise of the machine affects all of them equally."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.utils.errors import UserError

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class Pass:
    """A worker's measurements of one pass over the conversations."""

    seconds: float
    cpu_seconds: float
    """CPU time of all threads of the process."""
    added_mb: float
    """Peak since before the first pass; see :class:`benchmarks.training_step.worker.Memory`."""
    loss: float | None
    """Loss of the first step; None for an implementation without one."""


Round = dict[str, Pass]
"""Passes by the name of the implementation."""


class Worker:
    """A running process with the protocol of :mod:`benchmarks.training_step.worker`.

    Args:
        log: file that receives its standard error.

    Raises:
        UserError: the process ended too early; the message quotes its last line.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.ready: dict[str, Any] = {}
        """The message that the process sends when it is ready."""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Waits for the process to end by itself, with its own children; kills it at once after a failure."""
        try:
            self.process.communicate(timeout=0 if failure else PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def wait_until_ready(self) -> None:
        self.ready = self._answer()

    def measure(self) -> Pass:
        """Requests a pass and waits for its measurements."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; the missing answer raises below
        return Pass(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status, errors = self.process.wait(), self.log.read_text().strip() or "no message"
            raise UserError(f"{self.name}: its process ended with status {status}: {errors.splitlines()[-1]}")
        return json.loads(line)


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker.

    Few malloc arenas keep the resident memory close to the memory in use.  The wait policy of threads stays torch's.
    """
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_ARENA_MAX": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def interleave(workers: Sequence[Worker], rounds: int, advance: Callable[[], None] = lambda: None) -> list[Round]:
    """Runs rounds of one pass per worker, each round starting with another worker; calls ``advance`` after each."""
    measured = []
    for n in range(rounds):
        first = n % len(workers)
        measured.append({worker.name: worker.measure() for worker in [*workers[first:], *workers[:first]]})
        advance()
    return measured
