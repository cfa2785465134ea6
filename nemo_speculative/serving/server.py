"""An SGLang server as a subprocess: started, waited for, stopped with all its children."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_speculative.errors import UsageError, UserError

POLL_SECONDS = 0.5
HEALTH_SECONDS = 5.0
STOP_SECONDS = 20.0
LAST_LINES = 30


class ServerError(UserError):
    """A server that did not come up, or went down by itself; :attr:`log_tail` says why."""

    def __init__(self, message: str, log_tail: str):
        super().__init__(message)
        self.log_tail = log_tail


def require_free(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on.

    Raises:
        UsageError: the port is busy, or the host is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server does it: a port that is only cooling down after a close is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error}); choose another --port") from None


class Server:
    """A started server; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set beside those of this process.
        host, port: where it will answer.
        log: the file that takes all it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], host: str, port: int, log: Path):
        self.log, self.url = log, f"http://{_reachable(host)}:{port}"
        # Past the proxy of the environment: the server is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that all of it can be ended
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_healthy(self, timeout: float) -> None:
        """Returns when ``/health`` answers.

        Raises:
            ServerError: the server ended, or did not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._ended("before it was ready")
            if time.monotonic() > deadline:
                raise ServerError(f"SGLang was not ready after {timeout:g} s; its log is {self.log}", self._tail())
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Returns never: raises when the server goes down by itself.

        Raises:
            ServerError: it did.
        """
        self._process.wait()
        raise self._ended("while it served")

    def _healthy(self) -> bool:
        try:
            with self._opener.open(f"{self.url}/health", timeout=HEALTH_SECONDS) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _ended(self, when: str) -> ServerError:
        return ServerError(
            f"SGLang ended with code {self._process.returncode} {when}; its log is {self.log}", self._tail()
        )

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def stop(self) -> None:
        """Asks the server to end, which ends its children; then ends whatever of its process group is left."""
        # Not the group: SGLang takes a child that goes down before it for a crash, and looks into it for seconds.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
