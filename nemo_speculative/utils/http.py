"""HTTP clients with connection pools and bearer tokens, the errors they raise, and a load balancer over servers.

The blocking client is urllib3's: it reads large bodies (the remote target's hidden states) about four times as fast as
httpx.  The asynchronous client is httpx's.  Both ignore proxies of the environment and follow no redirect.
"""

import os
import random
import threading
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, Self, TypeVar

import httpx
import urllib3

from nemo_speculative.utils.errors import UserError, describe_error

API_KEY = "SGLANG_API_KEY"
"""The environment variable of an SGLang server's token.  A configuration key would be written into Hydra's records."""
POLL_SECONDS = 0.05
"""Time between two calls of :meth:`LoadBalancer.acquire` while no server is available."""


class Unreachable(UserError):
    """The server cannot be reached, or the connection broke; ``reason`` is the cause without the server's name."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason or message


class NotConnected(Unreachable):
    """No connection could be opened, so the server did not receive the request."""


class Refused(UserError):
    """The server answered this request with an error; others may succeed."""


class Unauthorized(UserError):
    """The server expects another token."""


def api_key() -> str | None:
    """The bearer token for SGLang servers, from the environment; None: they need none."""
    return os.environ.get(API_KEY)


class _Client:
    """The parts that both clients share.

    Args:
        url: the server's address; a path in it is put before each request's.
        token: sent as a bearer token.
        timeout: seconds without data after which a request fails.
        name, expected, token_variable: in error messages, the server (None: its url), the kind of server, and the
            environment variable of the token.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 600.0, connect_timeout: float = 10.0,
        name: str | None = None, expected: str = "an SGLang server", token_variable: str = API_KEY,
    ):  # fmt: skip
        self.url = url.rstrip("/")
        self.name, self.expected, self.token_variable = name or self.url, expected, token_variable
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout, self._connect_timeout = timeout, connect_timeout

    def _unreachable(self, error: Exception, kind: type[Unreachable] = Unreachable) -> Unreachable:
        reason = describe_error(error, 100)
        return kind(f"{self.name}: cannot be reached ({reason}); is {self.expected} running there?", reason)

    def _check_token(self, status: int) -> None:
        if status in (401, 403):
            raise Unauthorized(
                f"{self.name}: refuses the token (HTTP {status}); set the variable {self.token_variable} to the "
                "server's token"
            )


class Client(_Client):
    """A blocking client, see :class:`_Client`; several threads may use it.  A ``with`` block closes its connections."""

    def __init__(self, url: str, token: str | None = None, **options: Any):
        super().__init__(url, token, **options)
        self._pool = urllib3.PoolManager(maxsize=16, retries=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, timeout: float | None = None,
        **body: Any,
    ) -> urllib3.BaseHTTPResponse:  # fmt: skip
        """The server's response with any status; raises Unreachable or Unauthorized.

        ``body``: ``json=`` or ``body=``; ``preload_content=False`` leaves the response's body to be streamed.
        """
        limits = urllib3.Timeout(connect=timeout or self._connect_timeout, read=timeout or self._timeout)
        headers = self._headers | (headers or {})
        try:
            response = self._pool.request(
                method, self.url + path, headers=headers, timeout=limits, redirect=False, **body
            )
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            raise self._unreachable(error, NotConnected) from None
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from None
        self._check_token(response.status)
        return response


class AsyncClient(_Client):
    """An asynchronous client, see :class:`_Client`."""

    def __init__(self, url: str, token: str | None = None, **options: Any):
        super().__init__(url, token, **options)
        self._http = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self._timeout, connect=self._connect_timeout),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def request(self, method: str, path: str, **body: Any) -> httpx.Response:
        """The server's response with its body and any status, see :meth:`Client.request`; ``body``: ``json=``."""
        async with self.stream(method, path, **body) as response:
            await response.aread()
        return response

    @asynccontextmanager
    async def stream(self, method: str, path: str, **body: Any) -> AsyncIterator[httpx.Response]:
        """The server's response before its body is read; a failure while the block reads it raises ``Unreachable``."""
        try:
            async with self._http.stream(method, self.url + path, **body) as response:
                self._check_token(response.status_code)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL) as error:
            raise self._unreachable(error, NotConnected) from None
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None


class BalancedServer:
    """The state of one server in a :class:`LoadBalancer`; subclasses add a client to it."""

    def __init__(self, url: str):
        self.url, self.last_acquired = url, 0
        self.outstanding = 0  # requests that were sent and not answered yet
        self.failures = 0  # consecutive failed requests
        self.health_error: str | None = None  # the last failure; None: the last request succeeded
        self.retry_at = 0.0  # monotonic time before which it gets no request


S = TypeVar("S", bound=BalancedServer)


class LoadBalancer(Generic[S]):
    """Gives each request to the server with the fewest outstanding ones; a server that failed backs off.

    Usable from several threads.  A server whose last request failed gets one request at a time until one succeeds.

    Args:
        max_outstanding: requests at each server; None: no limit.
        first_backoff, max_backoff: seconds; the backoff doubles with each consecutive failure, with a jitter of half.
    """

    def __init__(
        self, servers: Sequence[S], *, max_outstanding: int | None = None, first_backoff: float = 0.5,
        max_backoff: float = 30.0,
    ):  # fmt: skip
        self.servers, self.max_outstanding = list(servers), max_outstanding
        self.first_backoff, self.max_backoff = first_backoff, max_backoff
        self._lock, self._count = threading.Lock(), 0
        self._random = random.Random()  # a training's global generator stays untouched

    def acquire(self, candidates: Collection[S] | None = None, avoid: S | None = None) -> S | None:
        """The least loaded of the ``candidates`` (None: of all), with a request added; equals take turns.

        ``avoid`` is chosen only where no other is available.  None where every candidate is full or backs off: call
        again after ``POLL_SECONDS``.
        """
        with self._lock:
            available = [s for s in (self.servers if candidates is None else candidates) if self.is_available(s)]
            if not available:
                return None
            server = min(available, key=lambda s: (s is avoid, s.outstanding, s.last_acquired))
            self._count += 1
            server.outstanding, server.last_acquired = server.outstanding + 1, self._count
            return server

    def is_available(self, server: S) -> bool:
        """Whether ``server`` can get a request now."""
        limit = 1 if server.failures else self.max_outstanding
        return time.monotonic() >= server.retry_at and (limit is None or server.outstanding < limit)

    def release(self, server: S) -> None:
        """Ends a request that :meth:`acquire` started."""
        with self._lock:
            server.outstanding -= 1

    def succeeded(self, server: S) -> None:
        server.failures, server.health_error, server.retry_at = 0, None, 0.0

    def failed(self, server: S, error: Exception | str) -> None:
        """Records a failure and starts the server's backoff."""
        backoff = min(self.first_backoff * 2**server.failures, self.max_backoff) * self._random.uniform(0.5, 1.5)
        server.failures, server.health_error = server.failures + 1, str(error)
        server.retry_at = time.monotonic() + backoff

    def pause(self, server: S, seconds: float) -> None:
        """Sends nothing to a busy server for some seconds; this is no failure."""
        server.retry_at = time.monotonic() + seconds
