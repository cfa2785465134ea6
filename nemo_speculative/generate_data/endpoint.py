"""Completions from HTTP servers: balanced, with a limit of requests at each, and retried elsewhere or later.

The ids as generated are needed: tokenizing an answer's text does not always give them back.  SGLang's ``/generate``
accepts and returns ids.  The ``/v1/completions`` of some other servers (vLLM) accepts a prompt of ids and returns ids
on request.  All others return text only.
"""

import asyncio
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

from nemo_speculative.config.schema import EndpointConfig, ModelConfig, TinyModelConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engines import CompletionFailed, Engine
from nemo_speculative.generate_data.rollout import Completion, Message, Request
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

FIRST_BACKOFF = 0.5
"""Seconds without requests after a server's first failure."""
STOPPED = {"stop": True, "eos": True, "tool_calls": True, "length": False}
"""Whether an answer ended by itself, by the servers' names of finish reasons."""


@dataclass(frozen=True)
class Protocol(ABC):
    """A route, its request bodies and its responses."""

    NAME: ClassVar[str]
    """Name of the route in a manifest."""
    PATH: ClassVar[str]

    model: str
    """The server's name of the model."""
    sampling: Sampling
    stop_ids: list[int]
    """Ids that end an answer, in addition to the server's own."""
    vocab_size: int

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]:
        """The JSON to send; raises ValueError if the route cannot express the request."""

    @abstractmethod
    def read(self, response: Any) -> Completion:
        """The completion in a response's JSON; raises any error of malformed data if there is none."""

    def _check_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"{ids!r:.60} are no ids of the target's vocabulary of {self.vocab_size}")
        return ids

    def _openai_body(self, request: Request) -> dict[str, Any]:
        """The fields that the OpenAI-compatible routes share."""
        sampling = self.sampling
        body = {"model": self.model, "max_tokens": request.limit, "temperature": sampling.temperature}
        if sampling.temperature:
            body |= {"top_p": sampling.top_p, "seed": request.seed}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        return body


class SGLangGenerate(Protocol):
    """SGLang's own route.  It uses seeds with --enable-deterministic-inference only."""

    NAME, PATH = "sglang", "/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = self.sampling
        params = {
            "max_new_tokens": request.limit, "temperature": sampling.temperature, "stop_token_ids": self.stop_ids
        }  # fmt: skip
        if sampling.temperature:
            params |= {"top_p": sampling.top_p, "top_k": sampling.top_k or -1, "sampling_seed": request.seed}
        return {"input_ids": request.prompt, "sampling_params": params}

    def read(self, response: Any) -> Completion:
        reason = response["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise ValueError(f"aborted: {reason.get('message')}")
        return Completion(self._check_ids(response["output_ids"]), STOPPED[reason["type"]])


class CompletionIds(Protocol):
    """``/v1/completions`` with ids both ways."""

    NAME, PATH = "completions", "/v1/completions"

    def body(self, request: Request) -> dict[str, Any]:
        body = {**self._openai_body(request), "return_token_ids": True, "prompt": request.prompt}
        return body | ({"stop_token_ids": self.stop_ids} if self.stop_ids else {})

    def read(self, response: Any) -> Completion:
        choice = response["choices"][0]
        return Completion(self._check_ids(choice["token_ids"]), STOPPED[choice["finish_reason"]])


class Chat(Protocol):
    """``/v1/chat/completions``: the server renders the conversation and returns text only."""

    NAME, PATH = "chat", "/v1/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        if not request.messages:
            raise ValueError("a row of token ids cannot be sent to a server that accepts text only")
        messages = [_convert_arguments(message, json.dumps, dict) for message in request.messages]
        body = {**self._openai_body(request), "messages": messages}
        return body | ({"tools": request.tools} if request.tools else {})

    def read(self, response: Any) -> Completion:
        choice = response["choices"][0]
        received, stopped = choice["message"], STOPPED[choice["finish_reason"]]
        message = {key: received[key] for key in ("content", "reasoning_content", "tool_calls") if received.get(key)}
        # At its limit an answer may consist of reasoning only.
        empty = not message.keys() & {"content", "tool_calls"}
        if not isinstance(received.get("content") or "", str) or (empty and stopped):
            raise ValueError("an answer without content")
        message = {"role": "assistant", "content": None if "tool_calls" in message else "", **message}
        return Completion(None, stopped, _convert_arguments(message, json.loads, str))


def _convert_arguments(message: Message, convert: Callable[[Any], Any], kind: type) -> Message:
    """``message`` with the tool calls' arguments of type ``kind`` converted.

    They are text in this API, and objects for chat templates and in the data.
    """
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    for call in calls:
        if isinstance(call["function"].get("arguments"), kind):
            call["function"]["arguments"] = convert(call["function"]["arguments"])
    return {**message, "tool_calls": calls}


class ServerUnavailable(Exception):
    """The server did not accept the request; another server may, or this one later."""


class ServerBusy(ServerUnavailable):
    """The server is running, but overloaded or failing."""


class RequestFailed(Exception):
    """The server accepted the request and returned no usable response."""


class InvalidResponse(RequestFailed):
    """The server is healthy, and its response is not a completion."""


class Server(BalancedServer):
    """One server: its protocol and model (``model``; None: its only one), and requests to it.

    ``options`` are the arguments of :class:`Protocol`, except for its model.
    """

    def __init__(self, url: str, model: str | None, timeout: float, options: dict[str, Any]):
        super().__init__(url.rstrip("/").removesuffix("/v1"))
        self._model_name, self._options = model, options
        token = os.environ.get(API_KEY) or os.environ.get("OPENAI_API_KEY")
        self.http = AsyncClient(self.url, token, timeout=timeout, token_variable=f"{API_KEY} or OPENAI_API_KEY")
        self.protocol: Protocol | None = None
        """None: to be identified, for the first time or after a lost connection."""
        self.context: int | None = None
        """Tokens of its longest sequence, if it reports them."""

    async def identify(self) -> dict[str, str]:
        """Detects the server's protocol; returns its part of the manifest.

        Only a refusal shows that the server lacks a route; any other failure, which raises ServerUnavailable, says
        nothing about its protocol.  Raises UserError if it does not serve the model.
        """
        try:
            models = await self._get("/v1/models") or {}
            native = await self._get("/model_info") or await self._get("/get_model_info")
            path = native.get("model_path") if isinstance(native, dict) else None
            card = self._model_card(models, path)
            self.context = card.get("max_model_len")
            protocol: Protocol = (CompletionIds if path is None else SGLangGenerate)(card["id"], **self._options)
            if path is None and not await self._returns_ids(protocol):
                protocol = Chat(card["id"], **self._options)
        except RequestFailed as error:
            raise ServerBusy(str(error)) from None
        self.protocol = protocol
        # The path, which SGLang reports, tells models apart that are served by the same name.
        return {"protocol": protocol.NAME, "target": protocol.model} | ({"model_path": path} if path else {})

    def _model_card(self, models: Any, path: str | None) -> dict[str, Any]:
        try:
            cards = {card["id"]: card for card in models.get("data", [])}
        except (AttributeError, KeyError, TypeError):
            cards = {}
        cards = cards or ({path: {"id": path}} if path else {})
        if not cards:
            raise UserError(f"{self.url}: /v1/models names no model; expected the url of an OpenAI-compatible server")
        base_models = [name for name, card in cards.items() if not card.get("parent")]
        name = self._model_name or (base_models[0] if len(base_models) == 1 else None)
        if name not in cards:
            raise UserError(
                f"{self.url}: has the models {', '.join(cards)}; name one of them with engine.model "
                f"(it is {self._model_name or 'null'})"
            )
        return cards[name]

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
        try:
            await self.complete(Request([*protocol.stop_ids, 0][:1], 1, 0, []), protocol)
        except (InvalidResponse, CompletionFailed):
            return False
        return True

    async def complete(self, request: Request, protocol: Protocol) -> Completion:
        """The response to ``request``; raises an error above, or CompletionFailed if it is refused for good."""
        try:
            body = protocol.body(request)
        except ValueError as error:
            raise CompletionFailed(str(error)) from None
        response = await self._send("POST", protocol.PATH, json=body)
        if response.status_code in (429, 503):
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
            return await self.http.request(method, path, **body)
        except Unreachable as error:
            self.protocol = None  # another server may answer at this address later
            raise (ServerUnavailable if isinstance(error, NotConnected) else RequestFailed)(error.reason) from None


def _is_refusal(status: int) -> bool:
    """Whether the same request will be refused again: by 501, and the 400s except for those that may change."""
    return status == 501 or (400 <= status < 500 and status not in (408, 409, 425, 429))


class EndpointEngine(Engine):
    """Completions from the servers of ``config.urls``, see :class:`Engine`.

    Each server reports which model it serves: at the start, and again after a lost connection.  All must agree.
    """

    def __init__(self, config: EndpointConfig, model: ModelConfig, sampling: Sampling):
        # No weights are downloaded: the tokenizer and the configuration are enough.
        directory = prepare_tiny(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
        super().__init__(directory, model.trust_remote_code, config.concurrency * len(config.urls))
        self.settings = config
        options = {"sampling": sampling, "stop_ids": sorted(self.stop_ids), "vocab_size": self.config.vocab_size}
        self.servers = [Server(url, config.model, config.timeout, options) for url in config.urls]
        self._balancer = LoadBalancer(self.servers, max_outstanding=config.concurrency, first_backoff=FIRST_BACKOFF)
        self._identity: dict[str, str] | None = None
        """The protocol and model that every server must have; None: no server has been identified yet."""
        self._all_failing_since: float | None = None
        self._last_failure = ""

    async def close(self) -> None:
        for server in self.servers:
            await server.http.close()

    async def identity(self) -> dict[str, Any]:
        deadline, busy = time.monotonic() + self.settings.give_up_after, self.servers
        while True:
            errors = await asyncio.gather(*map(self._try_identify, busy))
            if self._identity is not None:
                break
            busy = [server for server, error in zip(busy, errors, strict=True) if isinstance(error, ServerBusy)]
            if not busy or time.monotonic() > deadline:
                raise UserError(f"engine.urls: no server answers ({self._last_failure}); is one running there?")
            await asyncio.sleep(FIRST_BACKOFF)
        self.context = min([self.context, *(server.context for server in self.servers if server.context)])
        return {"engine": "endpoint", **self._identity}

    async def _try_identify(self, server: Server) -> ServerUnavailable | None:
        """Identifies ``server`` at the start of a run; returns the error if it cannot be reached yet."""
        try:
            await self._identify(server)
        except ServerUnavailable as error:
            if not server.failures:
                print_error(f"{server.url}: not available yet ({error})")
            self._failed(server, error)
            return error
        self._succeeded(server)
        return None

    async def _identify(self, server: Server) -> None:
        identity = await server.identify()
        if self._identity is None:
            self._identity = identity
        if identity != self._identity:
            raise UserError(
                f"{server.url}: serves {_describe(identity)}, where {_describe(self._identity)} answered until now; "
                "the same model has to answer all: stop that server, or give another output"
            )

    async def complete(self, request: Request) -> Completion:
        attempts = 0
        last: Server | None = None
        while True:
            server = await self._acquire(avoid=last)
            try:
                if server.protocol is None:
                    await self._identify(server)
                assert server.protocol is not None
                completion = await server.complete(request, server.protocol)
                self._succeeded(server)
                return completion
            except ServerUnavailable as error:  # no attempt: the request was not accepted
                self._failed(server, error)
            except RequestFailed as error:
                if isinstance(error, InvalidResponse):
                    self._succeeded(server)
                else:
                    self._failed(server, error)
                attempts += 1
                if attempts >= self.settings.attempts:
                    raise CompletionFailed(str(error), server.url, attempts) from None
            finally:
                self._balancer.release(server)
            last = server

    def _succeeded(self, server: Server) -> None:
        self._balancer.succeeded(server)
        self._all_failing_since = None

    def _failed(self, server: Server, error: Exception) -> None:
        self._balancer.failed(server, error)
        self._last_failure = f"{server.url}: {error}"
        if self._all_failing_since is None and all(other.failures for other in self.servers):
            self._all_failing_since = time.monotonic()

    async def _acquire(self, avoid: Server | None) -> Server:
        """Waits for an available server; raises UserError if all have been failing for too long."""
        while True:
            if (server := self._balancer.acquire(avoid=avoid)) is not None:
                return server
            since, limit = self._all_failing_since, self.settings.give_up_after
            if since is not None and time.monotonic() - since > limit:
                raise UserError(
                    f"engine.urls: no server has answered for {limit:g} seconds ({self._last_failure}); finished "
                    "answers are stored: repeat the command when one does"
                )
            await asyncio.sleep(POLL_SECONDS)


def _describe(identity: dict[str, str]) -> str:
    loaded = f", loaded from {identity['model_path']}" if "model_path" in identity else ""
    return f"{identity['target']} ({identity['protocol']}{loaded})"
