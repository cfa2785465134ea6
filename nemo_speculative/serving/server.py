"""SGLang as a subprocess: started, polled until healthy, smoke-tested, stopped with all its children."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from nemo_speculative.utils.errors import UsageError, UserError, describe_error
from nemo_speculative.utils.network import bind_socket

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

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
    """SGLang did not start, died or does not answer."""


class SGLangProcess:
    """A running SGLang process; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set in addition to those of this process.
        log: the file that receives all its output.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()):
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that all of it can be ended
                pass_fds=pass_fds,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self.stop()

    def exit_error(self, when: str) -> ServerError:
        """The error to raise when the process ended by itself; waits for its exit code."""
        return self.failure(f"SGLang ended with code {self._process.wait()} {when}")

    def failure(self, message: str) -> ServerError:
        """A :class:`ServerError`; prints the last lines of the log."""
        print(*self.log.read_text(errors="replace").splitlines()[-LAST_LINES:], sep="\n", file=sys.stderr)
        return ServerError(f"{message}; its log is {self.log}")

    def stop(self) -> None:
        """Terminates the process, which ends its children; then kills what is left of its process group."""
        try:
            # Not the group: SGLang takes a child that exits first for a crash, and spends seconds on diagnosing it.
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:  # also when a Ctrl-C ends the wait
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Server(SGLangProcess):
    """A running server that listens on ``host`` and ``port``; see :class:`SGLangProcess`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], host: str, port: int, log: Path):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        super().__init__(command, environment, log)

    def wait_until_healthy(self, timeout: float) -> None:
        """Returns when ``/health`` answers; raises ServerError if the server ended, or after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(UserError):  # not reachable yet
                if self._request("GET", "/health", timeout=HEALTH_SECONDS).status == HTTP_OK:
                    return
            if self._process.poll() is not None:
                raise self.exit_error("before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"SGLang was not ready after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    def smoke_test(self, timeout: float, api_key: str | None = None) -> tuple[int, int]:
        """Generates a few tokens, because a healthy server may have loaded no draft.

        Returns:
            The tokens and the verifications of the answer.

        Raises:
            ServerError: no token came within ``timeout`` seconds, or no draft was verified for them.
        """
        try:
            response = self._request("POST", "/generate", api_key, timeout=timeout, json=SMOKE_REQUEST)
            if response.status != HTTP_OK:
                raise ValueError(f"HTTP {response.status}")
            info = response.json()["meta_info"]
            tokens, verifications = info["completion_tokens"], info.get("spec_verify_ct", 0)
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise self.failure(f"SGLang is up but does not answer /generate ({describe_error(error)})") from None
        if tokens < 1:
            raise self.failure("SGLang is up but answers with no token")
        if verifications < 1:
            raise self.failure(f"SGLang answered with {tokens} tokens and verified no draft: it serves without it")
        return tokens, verifications

    def wait(self) -> NoReturn:
        """Blocks until the server ends by itself, which raises a ServerError."""
        raise self.exit_error("while it served")

    def _request(
        self, method: str, path: str, api_key: str | None = None, *, timeout: float, **body: Any
    ) -> "BaseHTTPResponse":
        from nemo_speculative.utils.http import Client  # slow to import, and not needed to print a command

        with Client(self.url, api_key, timeout=timeout) as client:
            return client.request(method, path, **body)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of the block: a half-finished stop would leave processes running."""
    received: list[int] = []

    def delay(number: int, _frame: object) -> None:
        received.append(number)

    # Only the main thread handles signals; another one is not interrupted.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, delay) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def require_free(host: str, port: int, description: str | None = None) -> None:
    """Raises UsageError if it is not possible to listen on the address, which the error calls ``description``."""
    with bind_socket(host, port, description or f"--host {host} --port {port}", UsageError):
        pass
