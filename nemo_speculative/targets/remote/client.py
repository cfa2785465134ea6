"""``backend=remote``: the target on other GPUs or machines, through target servers."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import urllib3

from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.targets.remote.protocol import (
    TOKEN_VARIABLE,
    FrameError,
    OutputLayout,
    TargetIdentity,
    bearer_token,
    pack_batch,
)
from nemo_speculative.utils.devices import to_device
from nemo_speculative.utils.errors import PeerLostError, UserError, describe_error
from nemo_speculative.utils.http import POLL_SECONDS, BalancedServer, Client, LoadBalancer, Unreachable

REFUSALS = {
    400: "",
    412: "; start the server with this run's model.path, model.dtype and aux layers",
    413: "; lower trainer.micro_batch_size or data.packed_length, or start the server with a larger max_tokens",
    422: "",
}
"""Statuses that any attempt at any server of the same target would get, and what to do about them."""
FAILURES = (Unreachable, FrameError, urllib3.exceptions.HTTPError)
"""Errors after which another server may succeed."""


class RemoteTarget(Target):
    """Hidden states from target servers that run the model in ``path``.

    A batch goes to the server with the fewest requests of this rank, and to another one if that fails.  Several threads
    may call.  Its options are those of RemoteBackendConfig.

    Raises:
        UserError: a server cannot be reached, refuses the token, or runs another target.
    """

    def __init__(
        self, path: Path, *, urls: Sequence[str], timeout: float = 300.0, connect_timeout: float = 5.0,
        attempts: int = 4, backoff_seconds: float = 5.0, **options: Any,
    ):  # fmt: skip
        super().__init__(path, **options)
        self.requests_ahead = len(urls)
        self.identity = TargetIdentity.of(self)
        servers = [ServerConnection(url, timeout, connect_timeout) for url in urls]
        self.servers = ServerPool(servers, timeout, attempts, backoff_seconds)
        self.servers.check(self.identity)

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """Raises PeerLostError if no server answers, UserError if one refuses the batch."""
        layout = OutputLayout.of(batch, self.config.hidden_size, self.identity)
        output = self.servers.request(pack_batch(batch), self.identity, layout, pinned=self.device.type == "cuda")
        output = output.shard(batch.shard)
        return TargetOutput(
            to_device(output.aux_hidden_states, self.device), to_device(output.last_hidden_state, self.device)
        )


class ServerBusy(Exception):
    """The server's queue is full; it asks to retry after :attr:`seconds`."""

    def __init__(self, seconds: float):
        super().__init__("its queue is full")
        self.seconds = seconds


class ServerConnection(BalancedServer):
    """One target server; ``timeout``: seconds to wait for an answer.

    Its methods raise ServerBusy, UserError for a refusal, or one of ``FAILURES`` without a usable answer.
    """

    def __init__(self, url: str, timeout: float, connect_timeout: float):
        super().__init__(url)
        self._client = Client(
            url, bearer_token(), timeout=timeout, connect_timeout=connect_timeout, name=f"backend.urls: {url}",
            expected="a target server", token_variable=TOKEN_VARIABLE,
        )  # fmt: skip

    def identity(self) -> TargetIdentity:
        """The identity of the server's target."""
        with self._open("GET", "/info") as response:
            try:
                info = response.json()
                return TargetIdentity(info["fingerprint"], info["dtype"], info["aux_layers"])
            except (ValueError, KeyError, TypeError):
                raise FrameError("what it answers is not a target server's /info") from None

    def fetch_hidden_states(self, request: bytes, identity: TargetIdentity, into: torch.Tensor) -> None:
        """Sends ``request`` and fills ``into``, uint8 [n], with the answer."""
        frame, at = into.numpy().data, 0
        with self._open("POST", "/supervise", body=request, headers={"If-Match": identity.tag}) as response:
            if (length := response.headers.get("Content-Length")) != str(len(frame)):
                raise FrameError(f"its answer has {length} bytes: expected {len(frame)}")
            for chunk in response.stream(1 << 20):
                frame[at : at + len(chunk)] = chunk
                at += len(chunk)

    def _open(self, method: str, path: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """A response of status 200 whose body is not read yet."""
        response = self._client.request(method, path, preload_content=False, **options)
        if response.status == 200:
            return response
        message = " ".join(response.data.decode(errors="replace").split())[:300]
        if response.status in REFUSALS:
            raise UserError(f"backend.urls: {self.url} refuses: {message}{REFUSALS[response.status]}")
        if response.status == 429:
            raise ServerBusy(float(response.headers.get("Retry-After", 1)))
        raise FrameError(f"status {response.status}: {message}")


class ServerPool(LoadBalancer[ServerConnection]):
    """The servers of a run; a request that fails at one is retried at another.

    Args:
        timeout: seconds of nothing but full queues after which a request is given up.
        attempts: failures of one request at a server after which it is not sent there again.
        backoff_seconds: seconds for which a server that failed gets no request, on average.
    """

    def __init__(self, servers: Sequence[ServerConnection], timeout: float, attempts: int, backoff_seconds: float):
        super().__init__(servers, first_backoff=backoff_seconds, max_backoff=backoff_seconds)
        self.timeout, self.attempts = timeout, attempts

    def is_available(self, server: ServerConnection) -> bool:
        # Threads do not take turns at a failing server: RemoteBackendConfig.longest_wait counts only own attempts.
        return time.monotonic() >= server.retry_at

    def check(self, identity: TargetIdentity) -> None:
        """Raises UserError if a server cannot be reached, or runs another target than that of ``identity``."""
        for server in self.servers:
            try:
                difference = identity.difference(server.identity())
            except (ServerBusy, *FAILURES) as error:
                raise UserError(
                    f"backend.urls: {server.url} does not answer as a target server ({_reason(error)}); start one "
                    "there (python -m nemo_speculative.serve_target), or leave it out"
                ) from None
            if difference:
                raise UserError(
                    f"backend.urls: {server.url} runs another target: {difference}; start it with this run's "
                    f"model.path, model.dtype and aux_layers={identity.aux_layers}"
                )

    def request(
        self, request: bytes, identity: TargetIdentity, layout: OutputLayout, pinned: bool = False
    ) -> TargetOutput:
        """The first answer to ``request`` that has ``layout``, on the host.

        Raises:
            PeerLostError: all attempts failed, or all queues stayed full.
            UserError: a server refuses the request.
        """
        failures: Counter[ServerConnection] = Counter()
        frame, candidates = layout.allocate(pinned), self.servers
        busy_since: float | None = None
        while True:
            while (server := self.acquire(candidates)) is None:
                time.sleep(POLL_SECONDS)
            try:
                server.fetch_hidden_states(request, identity, frame)
                output = layout.read(frame)
                self.succeeded(server)
                return output
            except ServerBusy as busy:
                self.pause(server, busy.seconds)
                reason = _reason(busy)
                # Counted from the first busy answer in a row: a failure may have taken long.
                busy_since = busy_since or time.monotonic()
            except FAILURES as error:
                reason = _reason(error)
                self.failed(server, reason)
                failures[server] += 1
                busy_since = None
            finally:
                self.release(server)
            candidates = [server for server in self.servers if failures[server] < self.attempts]
            if not candidates or (busy_since is not None and time.monotonic() > busy_since + self.timeout):
                urls = ", ".join(server.url for server in self.servers)
                raise PeerLostError(
                    f"backend.urls: no target server answers any more ({urls}); the last one tried, {server.url}: "
                    f"{reason}; restart them and resume with resume=auto"
                )

    def succeeded(self, server: ServerConnection) -> None:
        if server.health_error is not None:
            print(f"target server {server.url} answers again", file=sys.stderr, flush=True)
        super().succeeded(server)

    def failed(self, server: ServerConnection, error: Exception | str) -> None:
        if server.health_error is None:
            notice = f"target server {server.url} fails ({error}); trying another one, if there is any"
            print(notice, file=sys.stderr, flush=True)
        super().failed(server, error)


def _reason(error: Exception) -> str:
    if isinstance(error, Unreachable):
        return error.reason
    return describe_error(error) if isinstance(error, urllib3.exceptions.HTTPError) else str(error)
