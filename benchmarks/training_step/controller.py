"""Live processes asked in turn for one pass each, so that a noisy machine hits all of them alike."""

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
    """What a worker measured in one pass over the conversations."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""
    added_mb: float
    """The peak since before the first pass; see :class:`benchmarks.training_step.worker.Memory`."""
    loss: float | None
    """Of the pass's first step."""


Round = dict[str, Pass]
"""By the name of the implementation."""


class Worker:
    """A live process that speaks the protocol of :mod:`benchmarks.training_step.worker`.

    Args:
        log: where its standard error goes.

    Raises:
        UserError: it ended before it was asked to; its last line is quoted.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.ready: dict[str, Any] = {}
        """What it said when it was."""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Lets it end by itself, which ends what it started in turn; where something failed there is no time for it."""
        try:
            self.process.communicate(timeout=0 if failure else PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def wait_until_ready(self) -> None:
        self.ready = self._answer()

    def measure(self) -> Pass:
        """Asks for a pass, and waits for it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the missing answer says so
        return Pass(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status, said = self.process.wait(), self.log.read_text().strip() or "no message"
            raise UserError(f"{self.name}: its process ended with status {status}: {said.splitlines()[-1]}")
        return json.loads(line)


def worker_environment(threads: int) -> dict[str, str]:
    """Few arenas, so that memory is what is in use; threads wait as torch's always do, briefly awake."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_ARENA_MAX": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def interleave(workers: Sequence[Worker], rounds: int, advance: Callable[[], None] = lambda: None) -> list[Round]:
    """Rounds that ask every worker once, each round beginning with another one; ``advance`` is called after each."""
    measured = []
    for n in range(rounds):
        first = n % len(workers)
        measured.append({worker.name: worker.measure() for worker in [*workers[first:], *workers[:first]]})
        advance()
    return measured
