"""Completions from HTTP servers: balanced, with a limit of requests at each, and retried elsewhere or later."""

import asyncio
import os
import time
from typing import Any

import httpx

from nemo_speculative.config.schema import EndpointConfig, ModelConfig, TinyModelConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engines import CompletionFailed, Engine
from nemo_speculative.generate_data.protocols import Chat, CompletionIds, CompletionLogprobs, Protocol, SGLangGenerate
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.demo import prepare_tiny
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError, describe_error, print_error
from nemo_speculative.utils.http import (
    API_KEY,
    POLL_SECONDS,
    AsyncClient,
    BalancedServer,
    LoadBalancer,
    NotConnected,
    Unreachable,
)

OPENAI_API_KEY = "OPENAI_API_KEY"
BUSY = (429, 503)
RETRYABLE = (408, 409, 425, 429)
"""Statuses of the 400s that may differ for the same request later."""
NOT_IMPLEMENTED = 501
FIRST_BACKOFF = 0.5
"""Seconds without requests after a server's first failure."""


class ServerUnavailable(Exception):
    """The server did not accept the request; another server may, or this one later."""


class ServerBusy(ServerUnavailable):
    """The server is running, but overloaded or failing."""


class RequestFailed(Exception):
    """The server accepted the request and returned no usable response."""


class InvalidResponse(Exception):
    """The server is healthy, and its response is not a completion."""


class Server(BalancedServer):
    """One server: its protocol and model, and requests to it.

    Args:
        model: the name of the model to use; None: the server's only one.
        options: the arguments of :class:`Protocol`, except for its model.
    """

    def __init__(self, url: str, model: str | None, timeout: float, options: dict[str, Any]):
        super().__init__(url.rstrip("/").removesuffix("/v1"))
        self._model_name, self._options = model, options
        self._http = AsyncClient(
            self.url,
            os.environ.get(API_KEY) or os.environ.get(OPENAI_API_KEY),
            timeout=timeout,
            token_variable=f"{API_KEY} or {OPENAI_API_KEY}",
        )
        self.protocol: Protocol | None = None
        """None: to be identified, for the first time or after a lost connection."""
        self.context: int | None = None
        """Tokens of its longest sequence, if it reports them."""
        self.model_path: str | None = None
        """The path that its model was loaded from, if it reports it: the name that it serves it by may be any."""

    async def close(self) -> None:
        await self._http.close()

    async def identify(self) -> Protocol:
        """Finds the server's protocol.

        Only a refusal shows that the server lacks a route; any other failure says nothing about its protocol.

        Raises:
            ServerUnavailable: it cannot be reached, or is failing.
            Unauthorized: it expects another token.
            UserError: it does not serve the model.
        """
        try:
            models = await self._get("/v1/models") or {}
            native = await self._get("/model_info") or await self._get("/get_model_info")
            self.model_path = native.get("model_path") if isinstance(native, dict) else None
            card = self._model_card(models)
            self.context = card.get("max_model_len")
            if self.model_path is not None:
                return SGLangGenerate(card["id"], **self._options)
            for kind in (CompletionIds, CompletionLogprobs):
                protocol = kind(card["id"], **self._options)
                if await self._returns_ids(protocol):
                    return protocol
            return Chat(card["id"], **self._options)
        except RequestFailed as error:
            raise ServerBusy(str(error)) from None

    def _model_card(self, models: Any) -> dict[str, Any]:
        try:
            cards = {card["id"]: card for card in models.get("data", [])}
        except (AttributeError, KeyError, TypeError):
            cards = {}
        if not cards and self.model_path:
            cards = {self.model_path: {"id": self.model_path}}
        base_models = [name for name, card in cards.items() if not card.get("parent")]
        name = self._model_name or (base_models[0] if len(base_models) == 1 else None)
        if name in cards:
            return cards[name]
        if not cards:
            raise UserError(f"{self.url}: /v1/models names no model; expected the url of an OpenAI-compatible server")
        raise UserError(
            f"{self.url}: has the models {', '.join(cards)}; name one of them with engine.model "
            f"(it is {self._model_name or 'null'})"
        )

    async def _get(self, path: str) -> Any:
        """The JSON at ``path``; None: the server has no such route."""
        response = await self._send("GET", path)
        if not response.is_success and not _is_refusal(response.status_code):
            raise ServerBusy(f"HTTP {response.status_code}")
        try:
            return response.json() if response.is_success else None
        except ValueError:
            return None

    async def _returns_ids(self, protocol: Protocol) -> bool:
        """Whether a prompt of ids is completed with ids."""
        first = protocol.stop_ids[0] if protocol.stop_ids else 0
        try:
            await self._complete(protocol, Request([first], 1, 0, []))
        except (InvalidResponse, CompletionFailed):
            return False
        return True

    async def complete(self, request: Request) -> Completion:
        """
        Raises:
            ServerUnavailable: the server is unreachable or too busy.
            RequestFailed: it accepted the request and returned no usable response.
            InvalidResponse: its response is not a completion.
            CompletionFailed: it refuses this request for good.
            Unauthorized: it expects another token.
        """
        assert self.protocol is not None
        return await self._complete(self.protocol, request)

    async def _complete(self, protocol: Protocol, request: Request) -> Completion:
        try:
            body = protocol.body(request)
        except ValueError as error:
            raise CompletionFailed(str(error)) from None
        response = await self._send("POST", protocol.PATH, json=body)
        if response.status_code in BUSY:
            raise ServerBusy(f"HTTP {response.status_code}")
        if _is_refusal(response.status_code):
            raise CompletionFailed(f"refused with HTTP {response.status_code}", f"{self.url}: {response.text:.200}")
        if not response.is_success:
            raise RequestFailed(f"HTTP {response.status_code}")
        try:
            return protocol.read(response.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InvalidResponse(f"the response is not a completion ({describe_error(error, 100)})") from None

    async def _send(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **body)
        except Unreachable as error:
            self.protocol = None  # another server may answer at this address later
            raise (ServerUnavailable if isinstance(error, NotConnected) else RequestFailed)(error.reason) from None


def _is_refusal(status: int) -> bool:
    """Whether the same request will be refused again."""
    return (400 <= status < 500 and status not in RETRYABLE) or status == NOT_IMPLEMENTED


class EndpointEngine(Engine):
    """Completions from the servers of ``config.urls``, see :class:`Engine`.

    Each server reports which model it serves: at the start, and again after a lost connection.  All must agree.
    """

    def __init__(self, config: EndpointConfig, model: ModelConfig, sampling: Sampling):
        # No weights are downloaded: the tokenizer and the configuration are enough.
        directory = prepare_tiny(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
        super().__init__(directory, model.trust_remote_code)
        self.settings = config
        options = {"sampling": sampling, "stop_ids": sorted(self.stop_ids), "vocab_size": self.config.vocab_size}
        self.servers = [Server(url, config.model, config.timeout, options) for url in config.urls]
        self._balancer = LoadBalancer(self.servers, max_outstanding=config.concurrency, first_backoff=FIRST_BACKOFF)
        self._identity: dict[str, Any] | None = None
        """The protocol and model that every server must have; None: no server has been identified yet."""
        self._all_failing_since: float | None = None
        self._last_failure = ""

    @property
    def concurrency(self) -> int:
        return self.settings.concurrency * len(self.servers)

    async def close(self) -> None:
        for server in self.servers:
            await server.close()

    async def identity(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.settings.give_up_after
        errors = await asyncio.gather(*map(self._try_identify, self.servers))
        while self._identity is None:
            busy = [s for s, error in zip(self.servers, errors, strict=True) if isinstance(error, ServerBusy)]
            if not busy or time.monotonic() > deadline:
                raise UserError(
                    f"engine.urls: no server answers ({self.servers[0].url}: {errors[0]}); is one running there?"
                )
            await asyncio.sleep(POLL_SECONDS)
            for server in filter(self._balancer.is_available, busy):
                errors[self.servers.index(server)] = await self._try_identify(server)
        self.context = min([self.context, *(server.context for server in self.servers if server.context)])
        return {"engine": "endpoint", **self._identity}

    async def _try_identify(self, server: Server) -> ServerUnavailable | None:
        """Identifies ``server`` at the start of a run; returns the error if it cannot be reached yet."""
        try:
            await self._identify(server)
        except ServerUnavailable as error:
            self._balancer.failed(server, error)
            print_error(f"{server.url}: not available yet ({error})")
            return error
        self._balancer.succeeded(server)
        return None

    async def _identify(self, server: Server) -> None:
        protocol = await server.identify()
        identity = {"protocol": protocol.NAME, "target": protocol.model}
        if server.model_path:
            identity["model_path"] = server.model_path
        if self._identity is None:
            self._identity = identity
        if identity != self._identity:
            raise UserError(
                f"{server.url}: serves {_describe(identity)}, where {_describe(self._identity)} answered until now; "
                "the same model has to answer all: stop that server, or give another output"
            )
        server.protocol = protocol

    async def complete(self, request: Request) -> Completion:
        attempts = 0
        last: Server | None = None
        while True:
            server = await self._acquire(avoid=last)
            try:
                if server.protocol is None:
                    await self._identify(server)
                completion = await server.complete(request)
            except ServerUnavailable as error:  # no attempt: the request was not accepted
                self._record_failure(server, error)
            except (RequestFailed, InvalidResponse) as error:
                if isinstance(error, InvalidResponse):
                    self._record_success(server)
                else:
                    self._record_failure(server, error)
                attempts += 1
                if attempts >= self.settings.attempts:
                    raise CompletionFailed(str(error), server.url, attempts) from None
            else:
                self._record_success(server)
                return completion
            finally:
                self._balancer.release(server)
            last = server

    def _record_success(self, server: Server) -> None:
        self._balancer.succeeded(server)
        self._all_failing_since = None

    def _record_failure(self, server: Server, error: Exception) -> None:
        self._balancer.failed(server, error)
        self._last_failure = f"{server.url}: {error}"
        if self._all_failing_since is None and all(other.failures for other in self.servers):
            self._all_failing_since = time.monotonic()

    async def _acquire(self, avoid: Server | None) -> Server:
        """Waits for an available server.

        Raises:
            UserError: all servers have been failing for ``patience`` seconds.
        """
        while True:
            if (server := self._balancer.acquire(avoid=avoid)) is not None:
                return server
            failing_since = self._all_failing_since
            if failing_since is not None and time.monotonic() - failing_since > self.settings.give_up_after:
                raise UserError(
                    f"engine.urls: no server has answered for {self.settings.give_up_after:g} seconds "
                    f"({self._last_failure}); finished answers are stored: repeat the command when one does"
                )
            await asyncio.sleep(POLL_SECONDS)


def _describe(identity: dict[str, Any]) -> str:
    loaded = f", loaded from {identity['model_path']}" if "model_path" in identity else ""
    return f"{identity['target']} ({identity['protocol']}{loaded})"
