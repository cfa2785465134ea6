"""SGLang as a subprocess: started, polled until healthy, smoke-tested, stopped with all its children."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from nemo_speculative.utils.errors import UsageError, UserError, describe_error
from nemo_speculative.utils.network import bind_socket

STOP_SECONDS = 20.0
LAST_LINES = 30
POLL_SECONDS = 0.5
HEALTH_SECONDS = 5.0
HTTP_OK = 200
SMOKE_REQUEST = {
    # Ids that every vocabulary has, and an answer that neither a stop token nor the prefill alone can end.
    "input_ids": [1, 2, 3, 4],
    "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
}


class ServerError(UserError):
    """SGLang did not start, died or does not answer; :attr:`log_tail` holds the last lines of its log."""

    def __init__(self, message: str, log_tail: str):
        super().__init__(message)
        self.log_tail = log_tail


class SGLangProcess:
    """A running SGLang process; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set in addition to those of this process.
        log: the file that receives all its output.
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

    def exit_error(self, when: str) -> ServerError:
        """The error to raise when the process ended by itself; waits for its exit code."""
        return self.failure(f"SGLang ended with code {self._process.wait()} {when}")

    def failure(self, message: str) -> ServerError:
        """A :class:`ServerError` with the last lines of the log."""
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        return ServerError(f"{message}; its log is {self.log}", tail)

    def stop(self) -> None:
        """Terminates the process, which ends its children; then kills what is left of its process group."""
        # Not the group: SGLang takes a child that exits first for a crash, and spends seconds on diagnosing it.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class SmokeTest(NamedTuple):
    """Counts of the first answer of a server."""

    tokens: int
    verifications: int


class Server(SGLangProcess):
    """A running server; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set in addition to those of this process.
        host, port: the address that it will listen on.
        log: the file that receives all its output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], host: str, port: int, log: Path):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        super().__init__(command, environment, log)

    def wait_until_healthy(self, timeout: float) -> None:
        """Returns when ``/health`` answers.

        Raises:
            ServerError: the server ended, or did not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise self.exit_error("before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"SGLang was not ready after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    def smoke_test(self, timeout: float, api_key: str | None = None) -> SmokeTest:
        """Generates a few tokens, because a healthy server may have loaded no draft.

        Raises:
            ServerError: no token came within ``timeout`` seconds, or no draft was verified for them.
        """
        # Slow to import, and not needed to print a command.
        from nemo_speculative.utils.http import Client, Unauthorized, Unreachable

        try:
            with Client(self.url, api_key, timeout=timeout) as client:
                response = client.request("POST", "/generate", json=SMOKE_REQUEST)
            if response.status != HTTP_OK:
                raise ValueError(f"HTTP {response.status}")
            info = response.json()["meta_info"]
            result = SmokeTest(info["completion_tokens"], info.get("spec_verify_ct", 0))
        except (Unreachable, Unauthorized, ValueError, KeyError, TypeError) as error:
            raise self.failure(f"SGLang is up but does not answer /generate ({describe_error(error)})") from None
        if result.tokens < 1:
            raise self.failure("SGLang is up but answers with no token")
        if result.verifications < 1:
            raise self.failure(
                f"SGLang answered with {result.tokens} tokens and verified no draft: it serves without it"
            )
        return result

    def wait(self) -> None:
        """Blocks until the server ends by itself, which is an error.

        Raises:
            ServerError: always.
        """
        self._process.wait()
        raise self.exit_error("while it served")

    def _healthy(self) -> bool:
        from nemo_speculative.utils.http import Client, Unauthorized, Unreachable

        try:
            with Client(self.url, timeout=HEALTH_SECONDS) as client:
                return client.request("GET", "/health").status == HTTP_OK
        except (Unreachable, Unauthorized):
            return False


def require_free(host: str, port: int, description: str | None = None) -> None:
    """Refuses an address that cannot be listened on; errors call it ``description``, by default serve_sglang's flags.

    Raises:
        UsageError: the port is busy, or the host is not one of this machine's.
    """
    with bind_socket(host, port, description or f"--host {host} --port {port}", UsageError):
        pass
