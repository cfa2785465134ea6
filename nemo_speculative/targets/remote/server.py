"""The target server: supervision over HTTP, for as many trainers as ask, from one target.

A target is not made for several threads: one thread runs it, and what comes meanwhile waits in a queue of fixed length.
"""

import asyncio
import hmac
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_speculative import __version__
from nemo_speculative.config.schema import BackendConfig
from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.targets.remote.protocol import (
    HEADER_BYTES,
    TOKEN_BYTES,
    FrameError,
    Identity,
    frame_supervision,
    unpack_batch,
)
from nemo_speculative.utils.errors import UserError, describe_error, print_error

PIECE_BYTES = 1 << 20
"""Sent at once: small enough that what a slow reader leaves lying is small."""
RETRY_SECONDS = 1
"""What a trainer that finds the queue full is told to wait."""
SICK_FAILURES, SICK_SECONDS = 3, 300.0
"""/health is no longer well after so many failures of the target in a row, and while one forward takes longer."""


@dataclass(frozen=True)
class Limits:
    """What the server takes on."""

    queue: int
    """Requests at once: waiting, running or being answered."""
    max_tokens: int
    """Of one request."""
    io_timeout: float
    """Seconds for a request to arrive, and for its answer to be taken."""


class TargetServer:
    """The server; :attr:`app` is the ASGI application: POST /supervise, GET /info, /metrics and /health.

    Args:
        token: what a request has to carry as its bearer token, but for /health; None: nothing.
        backend: what the target was made from, for /info.
    """

    def __init__(self, target: Target, limits: Limits, token: str | None = None, backend: BackendConfig | None = None):
        self.figures, self.info = Figures(), describe(target, limits, backend)
        self.compute_hidden_states = Supervise(target, limits, self.figures)
        most = HEADER_BYTES + limits.max_tokens * TOKEN_BYTES
        self.app = Starlette(
            routes=[
                Route("/supervise", self.compute_hidden_states, methods=["POST"], max_body_size=most),
                Route("/info", lambda _request: JSONResponse(self.info)),
                Route("/metrics", lambda _request: PlainTextResponse(generate_latest(self.figures.registry))),
                Route("/health", self._health),
            ],
            middleware=[Middleware(RequireToken, token=token, most=most, limits=limits)] if token else [],
        )

    def _health(self, _request: Request) -> PlainTextResponse:
        sick = self.compute_hidden_states.worker.sick
        return PlainTextResponse(f"{sick or 'ok'}\n", 503 if sick else 200)

    @property
    def unanswered(self) -> int:
        """Requests that were taken on, and cut off."""
        return self.compute_hidden_states.cut_off


def describe(target: Target, limits: Limits, backend: BackendConfig | None) -> dict[str, Any]:
    """What /info says."""
    versions = {"nemo_speculative": __version__, "torch": torch.__version__}
    return asdict(Identity.of(target)) | {
        "hidden_size": target.config.hidden_size,
        "max_tokens": limits.max_tokens,
        "target": type(target).__name__,
        "backend": asdict(backend) if backend else None,
        "device": str(target.device),
        "versions": versions | {"transformers": transformers.__version__},
    }


class Figures:
    """What /metrics says, in Prometheus' terms."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {"namespace": "nemo_target", "registry": self.registry}
        self.requests = Counter("requests", "Requests to /supervise, by the status of the answer", ["code"], **labels)
        self.tokens = Counter("tokens", "Tokens that the target has read", **labels)
        self.seconds = Counter("busy_seconds", "Seconds that the target has run", **labels)
        self.received = Counter("received_bytes", "Bytes of requests", **labels)
        self.sent = Counter("sent_bytes", "Bytes of answers", **labels)
        self.queued = Gauge("queue_depth", "Requests that wait, run or are being answered", **labels)


class RequireToken:
    """Refuses with 401 what does not carry the bearer token.

    Args:
        most: bytes of a request that are read, and dropped, before it is refused.
    """

    def __init__(self, app: ASGIApp, token: str, most: int, limits: Limits):
        self.app, self.expected, self.most, self.limits = app, f"Bearer {token}".encode(), most, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] != "http" or scope["path"] == "/health" or hmac.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        await self._drop_body(receive)
        refusal = PlainTextResponse("the bearer token is missing or wrong", 401, {"WWW-Authenticate": "Bearer"})
        return await refusal(scope, receive, send)

    async def _drop_body(self, receive: Receive) -> None:
        """A connection that is closed on unread bytes loses the answer."""
        dropped, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.io_timeout):
                while more and dropped <= self.most:
                    message = await receive()
                    dropped, more = dropped + len(message.get("body", b"")), message.get("more_body", False)


class Worker:
    """The thread that runs the target, one batch after the other.

    A daemon: the process must be able to end while a forward hangs.
    """

    def __init__(self, target: Target, figures: Figures):
        self.target, self.figures = target, figures
        self._failures = 0
        self._since: float | None = None
        self._work: queue.SimpleQueue[tuple[Future[TargetOutput], Batch]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="target", daemon=True).start()

    def submit(self, batch: Batch) -> Future[TargetOutput]:
        """Its supervision, on the CPU; cancelled, it is not computed."""
        future: Future[TargetOutput] = Future()
        self._work.put((future, batch))
        return future

    @property
    def sick(self) -> str | None:
        """What is wrong with the target, for long or time and again; None: nothing."""
        since = self._since
        if since is not None and (taken := time.monotonic() - since) > SICK_SECONDS:
            return f"the target has been at one batch for {taken:.0f} s"
        if self._failures >= SICK_FAILURES:
            return f"the target failed {self._failures} times in a row"
        return None

    def _run(self) -> None:
        while True:
            future, batch = self._work.get()
            if not future.set_running_or_notify_cancel():
                continue
            self._since = time.monotonic()
            try:
                made = self._supervise(batch)
            except UserError as error:  # the batch's fault
                future.set_exception(error)
            except Exception as error:
                self._failures += 1
                future.set_exception(error)
            else:
                self._failures = 0
                future.set_result(made)
            self._since = None

    def _supervise(self, batch: Batch) -> TargetOutput:
        started = time.perf_counter()
        made = self.target.compute_hidden_states(batch.to(self.target.device))
        answer = TargetOutput(made.aux_hidden_states.cpu(), made.last_hidden_state.cpu())
        self.figures.seconds.inc(time.perf_counter() - started)
        self.figures.tokens.inc(batch.num_tokens)
        return answer


class Supervise:
    """POST /supervise.  An ASGI application of its own, as its place in the queue is kept until the answer is sent."""

    def __init__(self, target: Target, limits: Limits, figures: Figures):
        self.limits, self.figures, self.worker = limits, figures, Worker(target, figures)
        self.identity, self.vocab_size = Identity.of(target), target.config.vocab_size
        self.inside = self.cut_off = 0
        self._arriving = asyncio.Semaphore(limits.queue)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(Request(scope, receive), send)
            self.figures.requests.labels(200).inc()
        except HTTPException as refusal:
            self.figures.requests.labels(refusal.status_code).inc()
            raise
        except (ClientDisconnect, TimeoutError):
            # Nobody to answer; 499 as others count it.
            self.figures.requests.labels(499).inc()
        except asyncio.CancelledError:
            self.cut_off += 1
            raise

    async def _answer(self, request: Request, send: Send) -> None:
        # Before anything is refused: a connection that is closed on unread bytes loses the answer.
        async with self._arriving:  # the others' bytes stay in their sockets
            batch = self._batch(await self._body(request), request)
        with self._place():
            pieces = frame_supervision(await self._computed(batch, request.receive))
            length = sum(piece.nbytes for piece in pieces)
            headers = {"Content-Length": str(length), "ETag": self.identity.tag}
            response = StreamingResponse(_portions(pieces), headers=headers, media_type="application/octet-stream")
            async with asyncio.timeout(self.limits.io_timeout):
                await response(request.scope, request.receive, send)
            self.figures.sent.inc(length)

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.limits.io_timeout):
                body = await request.body()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {self.limits.io_timeout:g} s") from None
        self.figures.received.inc(len(body))
        return body

    def _batch(self, body: bytes, request: Request) -> Batch:
        if (asked := request.headers.get("if-match", "")) != self.identity.tag:
            raise HTTPException(412, f"this target is {self.identity.tag}, the one asked for {asked or 'not named'}")
        try:
            batch = unpack_batch(body, self.vocab_size)
        except FrameError as error:
            raise HTTPException(400, str(error)) from None
        if batch.num_tokens > self.limits.max_tokens:
            raise HTTPException(413, f"{batch.num_tokens} tokens: this server takes {self.limits.max_tokens} at once")
        return batch

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place in the queue; all of this runs in the event loop's thread."""
        if self.inside >= self.limits.queue:
            raise HTTPException(429, "the queue is full", {"Retry-After": str(RETRY_SECONDS)})
        self.inside += 1
        self.figures.queued.set(self.inside)
        try:
            yield
        finally:
            self.inside -= 1
            self.figures.queued.set(self.inside)

    async def _computed(self, batch: Batch, receive: Receive) -> TargetOutput:
        """Not computed where the trainer goes away before its turn."""
        work = asyncio.wrap_future(self.worker.submit(batch))
        gone = asyncio.ensure_future(receive())  # behind the body comes nothing else
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except UserError as error:
            raise HTTPException(422, f"the target refuses the batch: {error}") from None
        except Exception as error:
            said = f"the target failed: {describe_error(error)}"
            print_error(said)
            raise HTTPException(500, said) from error
        finally:
            gone.cancel()
            work.cancel()


async def _portions(pieces: list[memoryview]) -> AsyncIterator[memoryview]:
    for piece in pieces:
        for start in range(0, piece.nbytes, PIECE_BYTES):
            yield piece[start : start + PIECE_BYTES]
