"""An SGLang server as a subprocess: started, waited for, tried, stopped with all its children."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nemo_speculative.serving.process import SGLangProcess
from nemo_speculative.utils.errors import UsageError, describe_error
from nemo_speculative.utils.network import bind_socket

POLL_SECONDS = 0.5
HEALTH_SECONDS = 5.0
SMOKE = {
    # Ids that every vocabulary has, and an answer that neither a stop token nor the prefill alone can end.
    "input_ids": [1, 2, 3, 4],
    "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
}


@dataclass(frozen=True)
class Smoke:
    """What the first answer of a server took."""

    tokens: int
    verifications: int


def require_free(host: str, port: int, given_as: str | None = None) -> None:
    """Refuses an address that cannot be listened on; ``given_as`` is what the user calls it, by default serve_sglang's.

    Raises:
        UsageError: the port is busy, or the host is not one of this machine's.
    """
    with bind_socket(host, port, given_as or f"--host {host} --port {port}", UsageError):
        pass


class Server(SGLangProcess):
    """A started server; leaving the ``with`` block ends it and every process that it started.

    Args:
        command: the program and its arguments.
        environment: variables to set beside those of this process.
        host, port: where it will answer.
        log: the file that takes all it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], host: str, port: int, log: Path):
        self.url = f"http://{_reachable(host)}:{port}"
        # Past the proxy of the environment: the server is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        super().__init__(command, environment, log)

    def wait_until_healthy(self, timeout: float) -> None:
        """Returns when ``/health`` answers.

        Raises:
            ServerError: the server ended, or did not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise self.ended("before it was ready")
            if time.monotonic() > deadline:
                raise self.failed(f"SGLang was not ready after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    def smoke(self, timeout: float, api_key: str | None = None) -> Smoke:
        """Asks for a few tokens: a server can be healthy and have no part for the draft.

        Raises:
            ServerError: none came within ``timeout`` seconds, or no draft was verified for them.
        """
        try:
            info = self._generate(timeout, api_key)["meta_info"]
            found = Smoke(info["completion_tokens"], info.get("spec_verify_ct", 0))
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise self.failed(f"SGLang is up but does not answer /generate ({describe_error(error)})") from None
        if found.tokens < 1:
            raise self.failed("SGLang is up but answers with no token")
        if found.verifications < 1:
            raise self.failed(f"SGLang answered with {found.tokens} tokens and verified no draft: it serves without it")
        return found

    def wait(self) -> None:
        """Returns never: raises when the server goes down by itself.

        Raises:
            ServerError: it did.
        """
        self._process.wait()
        raise self.ended("while it served")

    def _healthy(self) -> bool:
        try:
            with self._opener.open(f"{self.url}/health", timeout=HEALTH_SECONDS) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _generate(self, timeout: float, api_key: str | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        request = urllib.request.Request(f"{self.url}/generate", json.dumps(SMOKE).encode(), headers)
        with self._opener.open(request, timeout=timeout) as answer:
            return json.load(answer)


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
