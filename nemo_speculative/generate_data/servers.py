"""One server that answers: what it is, whether it can be asked, and what a refusal of it means."""

import os
import random
import time
from typing import Any

import httpx

from nemo_speculative.generate_data.engine import Failed
from nemo_speculative.generate_data.protocols import Chat, CompletionIds, CompletionLogprobs, Protocol, SGLangGenerate
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.serving.client import API_KEY, CONNECT_SECONDS, WRONG_TOKEN, Unauthorized
from nemo_speculative.utils.errors import UserError, describe_error

OPENAI_API_KEY = "OPENAI_API_KEY"
BUSY = (429, 503)
NOT_FOR_GOOD = (408, 409, 425, 429)
NOT_IMPLEMENTED = 501
NOT_TAKEN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL)
FIRST_REST, LONGEST_REST = 0.5, 30.0
"""Seconds for which a server that failed is left alone; doubled with each failure, half as much more or less."""


class Down(Exception):
    """Nobody there, or no time for this request: another server may, or this one later."""


class Busy(Down):
    """It is there, and has no time, or is in trouble."""


class Broken(Exception):
    """The request was taken on, and no answer came of it."""


class NoAnswer(Exception):
    """What was answered is none, of a server that is well."""


class Server:
    """
    Args:
        model: which of its models answers; None: the only one.
        options: those of :class:`Protocol`, but for its model.
    """

    def __init__(self, url: str, model: str | None, timeout: float, options: dict[str, Any]):
        self.url, self._wanted, self._options = url.rstrip("/").removesuffix("/v1"), model, options
        token = os.environ.get(API_KEY) or os.environ.get(OPENAI_API_KEY)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self.protocol: Protocol | None = None
        """None: it is to be asked what it is, first or again."""
        self.outstanding, self.failures, self._rests_until = 0, 0, 0.0
        self.context: int | None = None
        """Tokens of its longest sequence, if it says so."""
        self.model_path: str | None = None
        """What its model was loaded from, if it says so: the name that it serves it by may be any."""

    async def close(self) -> None:
        await self._http.aclose()

    def takes(self, most: int) -> bool:
        """Whether it can be asked now; of one that has to prove itself anew, by one request."""
        return time.monotonic() >= self._rests_until and self.outstanding < (1 if self.failures else most)

    def succeeded(self) -> None:
        self.failures, self._rests_until = 0, 0.0

    def failed(self) -> None:
        """Leaves it alone for a while; who asks next does so alone."""
        rest = min(FIRST_REST * 2**self.failures, LONGEST_REST) * random.uniform(0.5, 1.5)
        self.failures, self._rests_until = self.failures + 1, time.monotonic() + rest

    async def identify(self) -> Protocol:
        """Asks what it is.

        What it cannot do it says by refusing it: trouble of any kind says nothing of what it is.

        Raises:
            Down: it cannot be reached, or is in trouble.
            Unauthorized: it wants another token.
            UserError: it has not the model.
        """
        try:
            return await self._identified()
        except Broken as error:
            raise Busy(str(error)) from None

    async def _identified(self) -> Protocol:
        models = await self._get("/v1/models") or {}
        native = await self._get("/model_info") or await self._get("/get_model_info")
        self.model_path = native.get("model_path") if isinstance(native, dict) else None
        card = self._model(models, self.model_path)
        self.context = card.get("max_model_len")
        if self.model_path is not None:
            return SGLangGenerate(card["id"], **self._options)
        for kind in (CompletionIds, CompletionLogprobs):
            protocol = kind(card["id"], **self._options)
            if await self._works(protocol):
                return protocol
        return Chat(card["id"], **self._options)

    def _model(self, models: Any, otherwise: str | None) -> dict[str, Any]:
        try:
            cards = {card["id"]: card for card in models.get("data", [])}
        except (AttributeError, KeyError, TypeError):
            cards = {}
        if not cards and otherwise:
            cards = {otherwise: {"id": otherwise}}
        bases = [name for name, card in cards.items() if not card.get("parent")]
        wanted = self._wanted or (bases[0] if len(bases) == 1 else None)
        if wanted in cards:
            return cards[wanted]
        if not cards:
            raise UserError(f"{self.url}: /v1/models names no model; expected the url of an OpenAI-compatible server")
        raise UserError(
            f"{self.url}: has the models {', '.join(cards)}; name one of them with engine.model "
            f"(it is {self._wanted or 'null'})"
        )

    async def _get(self, path: str) -> Any:
        """None: it has no such thing."""
        reply = await self._send("GET", path, None)
        if not reply.is_success and not _is_refusal(reply.status_code):
            raise Busy(f"HTTP {reply.status_code}")
        try:
            return reply.json() if reply.is_success else None
        except ValueError:
            return None

    async def _works(self, protocol: Protocol) -> bool:
        """Whether a prompt of ids is answered with ids."""
        first = protocol.stop_ids[0] if protocol.stop_ids else 0
        probe = Request([first], 1, 0, [])
        try:
            await self._asked(protocol, probe)
        except (NoAnswer, Failed):
            return False
        return True

    async def ask(self, request: Request) -> Completion:
        """
        Raises:
            Down: it is not there, or too busy.
            Broken: the answer failed.
            NoAnswer: it is none.
            Failed: it refuses this request for good.
            Unauthorized: it wants another token.
        """
        assert self.protocol is not None
        return await self._asked(self.protocol, request)

    async def _asked(self, protocol: Protocol, request: Request) -> Completion:
        try:
            body = protocol.body(request)
        except ValueError as error:
            raise Failed(str(error)) from None
        reply = await self._send("POST", protocol.PATH, body)
        if reply.status_code in BUSY:
            raise Busy(f"HTTP {reply.status_code}")
        if _is_refusal(reply.status_code):
            raise Failed(f"refused with HTTP {reply.status_code}", f"{self.url}: {reply.text:.200}")
        if not reply.is_success:
            raise Broken(f"HTTP {reply.status_code}")
        try:
            return protocol.read(reply.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise NoAnswer(f"what was answered is none ({describe_error(error, 100)})") from None

    async def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            reply = await self._http.request(method, self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.protocol = None  # who comes back may be another
            raise (Down if isinstance(error, NOT_TAKEN) else Broken)(describe_error(error, 100)) from None
        if reply.status_code in WRONG_TOKEN:
            raise Unauthorized(
                f"{self.url}: refuses the token (HTTP {reply.status_code}); give the server's as the variable "
                f"{API_KEY} or {OPENAI_API_KEY}"
            )
        return reply


def _is_refusal(status: int) -> bool:
    """Whether the same request will be refused again."""
    return (400 <= status < 500 and status not in NOT_FOR_GOOD) or status == NOT_IMPLEMENTED
