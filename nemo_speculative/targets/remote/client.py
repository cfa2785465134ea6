"""The target on other GPUs or machines, behind target servers: ``backend=remote``."""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import urllib3

from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead
from nemo_speculative.targets.remote.protocol import (
    TOKEN_VARIABLE,
    FrameError,
    Identity,
    Layout,
    bearer_token,
    pack_batch,
)
from nemo_speculative.utils.devices import send
from nemo_speculative.utils.errors import PeerLostError, UserError, describe_error

PIECE_BYTES = 1 << 20
CONNECTIONS = 16
"""Kept for each server: more than a rank has requests there at once."""
REFUSALS = {400, 401, 412, 413, 422}
"""What another attempt, or another server of the same kind, would answer alike."""


class RemoteTarget(EmbeddingAndHead):
    """The ends of the model in ``path``, and supervision from target servers that run the same model.

    A micro-batch goes to the server with the fewest of ours, and elsewhere if that one fails.  Several threads may ask.

    Args:
        urls, timeout, connect_timeout, attempts, backoff_seconds: see
            :class:`nemo_speculative.config.schema.RemoteBackendConfig`.
        ends: those of :class:`nemo_speculative.targets.embedding_and_head.EmbeddingAndHead`.

    Raises:
        UserError: a server cannot be reached, refuses the token, or runs another target.
    """

    def __init__(
        self,
        path: Path,
        *,
        urls: Sequence[str],
        timeout: float = 300.0,
        connect_timeout: float = 5.0,
        attempts: int = 4,
        backoff_seconds: float = 5.0,
        **ends: Any,
    ):
        super().__init__(path, **ends)
        self.requests_ahead = len(urls)
        self.identity = Identity.of(self)
        limits = urllib3.Timeout(connect=connect_timeout, read=timeout)
        self.servers = Servers([Server(url, limits) for url in urls], timeout, attempts, backoff_seconds)
        self.servers.check(self.identity)

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """
        Raises:
            UserError: no server answers, or one refuses the batch.
        """
        layout = Layout.of(batch, self.config.hidden_size, self.identity)
        made = self.servers.ask(pack_batch(batch), self.identity, layout, pinned=self.device.type == "cuda")
        made = made.of(batch.shard)
        return TargetOutput(send(made.aux_hidden_states, self.device), send(made.last_hidden_state, self.device))


class Busy(Exception):
    """The server's queue is full; :attr:`seconds` says for how long to leave it alone."""

    def __init__(self, seconds: float):
        super().__init__("its queue is full")
        self.seconds = seconds


class Failed(Exception):
    """No answer, or none that can be used."""


class Server:
    """One target server, and what is known of it.

    Raises:
        UserError: see :func:`nemo_speculative.targets.remote.protocol.bearer_token`.
    """

    def __init__(self, url: str, timeout: urllib3.Timeout):
        self.url = url
        self.turn = self.outstanding = 0
        self.rests_until, self.failing = 0.0, False
        token = bearer_token()
        self._token = {"Authorization": f"Bearer {token}"} if token else {}
        self._path = (urllib3.util.parse_url(url).path or "").rstrip("/")
        self._connections = urllib3.connection_from_url(url, maxsize=CONNECTIONS, timeout=timeout, retries=False)

    def info(self) -> dict[str, Any]:
        """What it says of itself.

        Raises:
            Busy, Failed, UserError: it cannot be asked.
        """
        try:
            with self._answer("GET", "/info") as answer:
                return answer.json()
        except (ValueError, urllib3.exceptions.HTTPError):
            raise Failed("what it says is not a target server's /info") from None

    def compute_hidden_states(self, asked: bytes, identity: Identity, into: torch.Tensor) -> None:
        """Sends ``asked`` and fills ``into``, uint8 [n], with the answer.

        Raises:
            Busy, Failed, UserError: there is none, it has another length, or the server refuses.
        """
        frame, at = into.numpy().data, 0
        try:
            with self._answer("POST", "/supervise", asked, {"If-Match": identity.tag}) as answer:
                if (length := answer.headers.get("Content-Length")) != str(len(frame)):
                    raise Failed(f"its answer has {length} bytes: expected {len(frame)}")
                for piece in answer.stream(PIECE_BYTES):
                    frame[at : at + len(piece)] = piece
                    at += len(piece)
        except urllib3.exceptions.HTTPError as error:
            raise Failed(describe_error(error)) from None

    def rest(self, seconds: float) -> None:
        """Leaves it alone for a while."""
        self.rests_until = time.monotonic() + seconds

    def now(self, failing: str | None) -> None:
        """Says so, once, when it begins to fail (and with what), and when it answers again."""
        if self.failing != bool(failing):
            self.failing = bool(failing)
            said = f"fails ({failing}); asking elsewhere, if there is another" if failing else "answers again"
            print(f"target server {self.url} {said}", file=sys.stderr, flush=True)

    def _answer(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """The beginning of a good answer, whose body is not read yet."""
        try:
            answer = self._connections.request(
                method,
                self._path + path,
                body=body,
                headers=self._token | (headers or {}),
                preload_content=False,
            )
            if answer.status == 200:
                return answer
            said = " ".join(answer.data.decode(errors="replace").split())[:300]
        except urllib3.exceptions.HTTPError as error:
            raise Failed(describe_error(error)) from None
        if answer.status in REFUSALS:
            raise UserError(f"backend.urls: {self.url} refuses: {said}{ADVICE.get(answer.status, '')}")
        if answer.status == 429:
            raise Busy(float(answer.headers.get("Retry-After", 1)))
        raise Failed(f"status {answer.status}: {said}")


ADVICE = {
    401: f"; set {TOKEN_VARIABLE} to the token that the server was started with",
    412: "; start the server with this run's model.path, model.dtype and aux layers",
    413: "; lower trainer.micro_batch_size or data.packed_length, or start the server with a larger max_tokens",
}
"""What to do about a refusal, by its status."""


class Patience:
    """What one micro-batch has met with, and whether it is tried further."""

    def __init__(self, timeout: float, attempts: int):
        self.timeout, self.attempts = timeout, attempts
        self.failures: Counter[Server] = Counter()
        self._until: float | None = None

    def busy(self) -> None:
        """A server was full.  Counted from the first of such answers in a row: a failure may have taken long."""
        self._until = self._until or time.monotonic() + self.timeout

    def failed(self, server: Server) -> None:
        self.failures[server] += 1
        self._until = None

    def left(self, servers: Sequence[Server]) -> list[Server]:
        """Those that have not failed too often."""
        return [server for server in servers if self.failures[server] < self.attempts]

    @property
    def ended(self) -> bool:
        """Whether servers have been full for too long."""
        return self._until is not None and time.monotonic() > self._until


class Servers:
    """The servers of a run; what fails at one is tried at the next.

    Args:
        timeout: seconds for which servers that are busy are waited for, where nothing else happens.
        attempts: failures of one micro-batch at a server, after which it is asked there no more.
        rest: seconds for which a server that failed is left alone.
    """

    def __init__(self, servers: Sequence[Server], timeout: float, attempts: int, rest: float):
        self.servers, self.timeout, self.attempts, self.rest = list(servers), timeout, attempts, rest
        self._choosing, self._turns = threading.Lock(), 0

    def check(self, identity: Identity) -> None:
        """Every server runs the target of ``identity``.

        Raises:
            UserError: one cannot be reached, or runs another.
        """
        for server in self.servers:
            try:
                info = server.info()
                found = Identity(*(info[name] for name in ("fingerprint", "dtype", "aux_layers")))
            except (Busy, Failed, KeyError, TypeError) as error:
                raise UserError(
                    f"backend.urls: {server.url} does not answer as a target server ({error}); start one there "
                    "(python -m nemo_speculative.serve_target), or leave it out"
                ) from None
            if difference := identity.difference(found):
                raise UserError(
                    f"backend.urls: {server.url} runs another target: {difference}; start it with this run's "
                    f"model.path, model.dtype and aux_layers={identity.aux_layers}"
                )

    def ask(self, asked: bytes, identity: Identity, layout: Layout, pinned: bool = False) -> TargetOutput:
        """The first answer to ``asked`` that has ``layout``, on the host.

        Raises:
            UserError: none came in the attempts that there are, or a server refuses the request.
        """
        patience, frame = Patience(self.timeout, self.attempts), layout.buffer(pinned)
        while True:
            with self._next(patience.left(self.servers)) as server:
                try:
                    server.compute_hidden_states(asked, identity, frame)
                    found = layout.read(frame)
                    server.now(failing=None)
                    return found
                except Busy as busy:
                    server.rest(busy.seconds)
                    why = str(busy)
                    patience.busy()
                except (Failed, FrameError) as error:
                    why = str(error)
                    server.rest(self.rest)
                    server.now(failing=why)
                    patience.failed(server)
            if patience.ended or not patience.left(self.servers):
                raise PeerLostError(self._no_answer(server, why))

    def _no_answer(self, last: Server, why: str) -> str:
        urls = ", ".join(server.url for server in self.servers)
        return (
            f"backend.urls: no target server answers any more ({urls}); the last one tried, {last.url}: {why}; start "
            "them again and go on with resume=auto"
        )

    @contextlib.contextmanager
    def _next(self, servers: Sequence[Server]) -> Iterator[Server]:
        """The one with the fewest requests of ours that does not rest; waits for one.  Equals take turns."""
        while True:
            with self._choosing:
                now = time.monotonic()
                chosen = min(servers, key=lambda s: (max(s.rests_until - now, 0), s.outstanding, s.turn))
                wait = chosen.rests_until - now
                if wait <= 0:
                    self._turns += 1
                    chosen.turn = self._turns
                    chosen.outstanding += 1
                    break
            time.sleep(wait)
        try:
            yield chosen
        finally:
            with self._choosing:
                chosen.outstanding -= 1
