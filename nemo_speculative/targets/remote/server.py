"""The target server: hidden states over HTTP for any number of trainers, from one target.

Targets are not thread-safe: one thread runs the target, and further requests wait in a queue of fixed length.
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
    MAX_HEADER_BYTES,
    MAX_TOKEN_BYTES,
    FrameError,
    TargetIdentity,
    pack_output,
    unpack_batch,
)
from nemo_speculative.utils.errors import UserError, describe_error, print_error

CHUNK_BYTES = 1 << 20
"""Bytes sent at once, and so the most that is buffered for a slow reader."""
RETRY_AFTER_SECONDS = 1
"""Retry-After of a full queue."""
UNHEALTHY_FAILURES, UNHEALTHY_SECONDS = 3, 300.0
"""/health fails after this number of consecutive failures, and while one batch takes more than this many seconds."""


@dataclass(frozen=True)
class ServerLimits:
    """Limits on requests."""

    queue: int
    """Requests at once: waiting, running or being answered."""
    max_tokens: int
    """Tokens of one request."""
    io_timeout: float
    """Seconds for a request to arrive, and for its answer to be read."""

    @property
    def max_bytes(self) -> int:
        """Largest size of a request."""
        return MAX_HEADER_BYTES + self.max_tokens * MAX_TOKEN_BYTES


class TargetServer:
    """The server; :attr:`app` is the ASGI application: POST /supervise, GET /info, /metrics and /health.

    It is itself the ASGI application of /supervise, because a request keeps its queue slot until its answer is sent.
    All requests but /health must carry the bearer token, if there is one.  ``backend`` is for /info.
    """

    def __init__(
        self, target: Target, limits: ServerLimits, token: str | None = None, backend: BackendConfig | None = None
    ):
        self.target, self.limits, self.identity = target, limits, TargetIdentity.of(target)
        self.metrics = ServerMetrics()
        self.active = self.cancelled = 0
        """Requests in the queue now, and accepted requests that were cut off by the shutdown."""
        self._failures = 0
        self._running_since: float | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[TargetOutput], Batch]] = queue.SimpleQueue()
        # A daemon, unlike an executor's thread: the process can exit while a forward pass hangs.
        threading.Thread(target=self._run_jobs, name="target", daemon=True).start()
        self._arriving = asyncio.Semaphore(limits.queue)
        versions = {"nemo_speculative": __version__, "torch": torch.__version__}
        info = asdict(self.identity) | {
            "hidden_size": target.config.hidden_size,
            "max_tokens": limits.max_tokens,
            "target": type(target).__name__,
            "backend": asdict(backend) if backend else None,
            "device": str(target.device),
            "versions": versions | {"transformers": transformers.__version__},
        }
        self.app = Starlette(
            routes=[
                Route("/supervise", self, methods=["POST"], max_body_size=limits.max_bytes),
                Route("/info", lambda _request: JSONResponse(info)),
                Route("/metrics", lambda _request: PlainTextResponse(generate_latest(self.metrics.registry))),
                Route("/health", self._health),
            ],
            middleware=[Middleware(BearerTokenMiddleware, token=token, limits=limits)] if token else [],
        )

    def _health(self, _request: Request) -> PlainTextResponse:
        since = self._running_since
        if since is not None and (seconds := time.monotonic() - since) > UNHEALTHY_SECONDS:
            return PlainTextResponse(f"the target has been at one batch for {seconds:.0f} s\n", 503)
        if self._failures >= UNHEALTHY_FAILURES:
            return PlainTextResponse(f"the target failed {self._failures} times in a row\n", 503)
        return PlainTextResponse("ok\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(Request(scope, receive), send)
            self.metrics.requests.labels(200).inc()
        except HTTPException as refusal:
            self.metrics.requests.labels(refusal.status_code).inc()
            raise
        except (ClientDisconnect, TimeoutError):
            # The client is gone; 499 is nginx's status for that.
            self.metrics.requests.labels(499).inc()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, request: Request, send: Send) -> None:
        # The body is read before any refusal: closing a connection with unread bytes would lose the answer.
        async with self._arriving:  # further requests stay in their sockets
            batch = await self._read_batch(request)
        with self._queue_slot():
            pieces = pack_output(await self._result(batch, request.receive))
            length = sum(piece.nbytes for piece in pieces)
            headers = {"Content-Length": str(length), "ETag": self.identity.tag}
            response = StreamingResponse(_chunks(pieces), headers=headers, media_type="application/octet-stream")
            async with asyncio.timeout(self.limits.io_timeout):
                await response(request.scope, request.receive, send)
            self.metrics.sent.inc(length)

    async def _read_batch(self, request: Request) -> Batch:
        try:
            async with asyncio.timeout(self.limits.io_timeout):
                body = await request.body()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {self.limits.io_timeout:g} s") from None
        self.metrics.received.inc(len(body))
        if (tag := request.headers.get("if-match", "")) != self.identity.tag:
            raise HTTPException(412, f"this target is {self.identity.tag}, the requested one is {tag or 'not named'}")
        try:
            batch = unpack_batch(body, self.target.config.vocab_size)
        except FrameError as error:
            raise HTTPException(400, str(error)) from None
        if batch.num_tokens > self.limits.max_tokens:
            raise HTTPException(413, f"{batch.num_tokens} tokens: this server takes {self.limits.max_tokens} at once")
        return batch

    @contextmanager
    def _queue_slot(self) -> Iterator[None]:
        """A slot in the queue; no lock is needed, because only the event loop's thread gets here."""
        if self.active >= self.limits.queue:
            raise HTTPException(429, "the queue is full", {"Retry-After": str(RETRY_AFTER_SECONDS)})
        self.active += 1
        self.metrics.queued.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.queued.set(self.active)

    async def _result(self, batch: Batch, receive: Receive) -> TargetOutput:
        """Waits for the thread; the batch is not computed if the client disconnects before its turn."""
        job: Future[TargetOutput] = Future()
        self._jobs.put((job, batch))
        output = asyncio.wrap_future(job)
        disconnected = asyncio.ensure_future(receive())  # nothing else follows the body
        try:
            await asyncio.wait((output, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not output.done():
                raise ClientDisconnect
            return output.result()
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except UserError as error:
            raise HTTPException(422, f"the target refuses the batch: {error}") from None
        except Exception as error:
            message = f"the target failed: {describe_error(error)}"
            print_error(message)
            raise HTTPException(500, message) from error
        finally:
            disconnected.cancel()
            output.cancel()

    def _run_jobs(self) -> None:
        while True:
            job, batch = self._jobs.get()
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(self._compute(batch))
                except Exception as error:
                    job.set_exception(error)

    def _compute(self, batch: Batch) -> TargetOutput:
        """The output for a batch, on the CPU."""
        self._running_since = started = time.monotonic()
        try:
            output = self.target.compute_hidden_states(batch.to(self.target.device))
            output = TargetOutput(output.aux_hidden_states.cpu(), output.last_hidden_state.cpu())
        except UserError:  # caused by the batch, not by the target
            raise
        except Exception:
            self._failures += 1
            raise
        finally:
            self._running_since = None
        self._failures = 0
        self.metrics.seconds.inc(time.monotonic() - started)
        self.metrics.tokens.inc(batch.num_tokens)
        return output


async def _chunks(pieces: list[memoryview]) -> AsyncIterator[memoryview]:
    for piece in pieces:
        for start in range(0, piece.nbytes, CHUNK_BYTES):
            yield piece[start : start + CHUNK_BYTES]


class ServerMetrics:
    """Prometheus metrics of /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "nemo_target", "registry": self.registry}
        self.requests = Counter("requests", "Requests to /supervise, by the status of the answer", ["code"], **common)
        self.tokens = Counter("tokens", "Tokens that the target has read", **common)
        self.seconds = Counter("busy_seconds", "Seconds that the target has run", **common)
        self.received = Counter("received_bytes", "Bytes of requests", **common)
        self.sent = Counter("sent_bytes", "Bytes of answers", **common)
        self.queued = Gauge("queue_depth", "Requests that wait, run or are being answered", **common)


class BearerTokenMiddleware:
    """Answers requests without the bearer token with 401."""

    def __init__(self, app: ASGIApp, token: str, limits: ServerLimits):
        self.app, self.expected, self.limits = app, f"Bearer {token}".encode(), limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] != "http" or scope["path"] == "/health" or hmac.compare_digest(header, self.expected):
            return await self.app(scope, receive, send)
        await self._drain_body(receive)
        refusal = PlainTextResponse("the bearer token is missing or wrong", 401, {"WWW-Authenticate": "Bearer"})
        return await refusal(scope, receive, send)

    async def _drain_body(self, receive: Receive) -> None:
        """Reads and drops the body: closing a connection with unread bytes would lose the answer."""
        dropped, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.io_timeout):
                while more and dropped <= self.limits.max_bytes:
                    message = await receive()
                    dropped, more = dropped + len(message.get("body", b"")), message.get("more_body", False)
