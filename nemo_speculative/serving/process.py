"""SGLang as a subprocess: its output goes to a file, and stopping it ends all its children."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemo_speculative.utils.errors import UserError

STOP_SECONDS = 20.0
LAST_LINES = 30


class ServerError(UserError):
    """SGLang did not come up, went down by itself, or does not answer; :attr:`log_tail` says why."""

    def __init__(self, message: str, log_tail: str):
        super().__init__(message)
        self.log_tail = log_tail


class SGLangProcess:
    """A started process; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set beside those of this process.
        log: the file that takes all it prints.
        popen: further arguments of :class:`subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, **popen: Any):
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that all of it can be ended
                **{"stdin": subprocess.DEVNULL, **popen},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ended(self, when: str) -> ServerError:
        """What to raise when it went down by itself."""
        return self.failed(f"SGLang ended with code {self._process.wait()} {when}")

    def failed(self, what: str) -> ServerError:
        """What to raise, with the last lines of the log."""
        return ServerError(f"{what}; its log is {self.log}", self._tail())

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def stop(self) -> None:
        """Asks it to end, which ends its children; then ends whatever of its process group is left."""
        # Not the group: SGLang takes a child that goes down before it for a crash, and looks into it for seconds.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
