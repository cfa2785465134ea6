"""Servers answer: balanced, a limited number of requests at each, and tried again elsewhere or later."""

import asyncio
import time
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import EndpointConfig, ModelConfig, TinyModelConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engine import Engine, Failed
from nemo_speculative.generate_data.protocols import Protocol
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.generate_data.servers import Broken, Busy, Down, NoAnswer, Server
from nemo_speculative.targets.demo import prepare_tiny
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError, print_error

POLL_SECONDS = 0.05


class EndpointEngine(Engine):
    """See :class:`Engine`.

    What the servers state is what is believed: it is asked at the start, and again of each that comes back.
    """

    def __init__(self, config: EndpointConfig, model: ModelConfig, sampling: Sampling):
        super().__init__(_described(model), model.trust_remote_code)
        self.settings = config
        options = {"sampling": sampling, "stop_ids": sorted(self.stop_ids), "vocab_size": self.config.vocab_size}
        self.servers = [Server(url, config.model, config.timeout, options) for url in config.urls]
        self._stated: dict[str, Any] | None = None
        self._dark_since: float | None = None
        self._last_trouble = ""

    @property
    def concurrency(self) -> int:
        return self.settings.concurrency * len(self.servers)

    async def close(self) -> None:
        for server in self.servers:
            await server.close()

    async def identity(self) -> dict[str, Any]:
        until = time.monotonic() + self.settings.patience
        found = await asyncio.gather(*map(self._found, self.servers))
        while self._stated is None:
            busy = [s for s, trouble in zip(self.servers, found, strict=True) if isinstance(trouble, Busy)]
            if not busy or time.monotonic() > until:
                raise UserError(
                    f"engine.urls: no server can be asked ({self.servers[0].url}: {found[0]}); is one running there?"
                )
            await asyncio.sleep(POLL_SECONDS)
            for server in (one for one in busy if one.takes(1)):
                found[self.servers.index(server)] = await self._found(server)
        self.context = min([self.context, *(server.context for server in self.servers if server.context)])
        return {"engine": "endpoint", **self._stated}

    async def _found(self, server: Server) -> Down | None:
        """What keeps it from being asked, at the start."""
        try:
            await self._identified(server)
        except Down as error:
            server.failed()
            print_error(f"{server.url}: cannot be asked yet ({error})")
            return error
        server.succeeded()
        return None

    async def _identified(self, server: Server) -> None:
        protocol = await server.identify()
        stated = _stated(server, protocol)
        if self._stated is None:
            self._stated = stated
        if stated != self._stated:
            raise UserError(
                f"{server.url}: serves {_said(stated)}, where {_said(self._stated)} answered until now; the same model "
                "has to answer all: stop that server, or give another output"
            )
        server.protocol = protocol

    async def complete(self, request: Request) -> Completion:
        tried = 0
        avoided: Server | None = None
        while True:
            server = await self._taken(avoided)
            try:
                if server.protocol is None:
                    await self._identified(server)
                completion = await server.ask(request)
            except Down as error:
                self._trouble(server, error)
            except (Broken, NoAnswer) as error:
                self._well(server) if isinstance(error, NoAnswer) else self._trouble(server, error)
                tried += 1
                if tried >= self.settings.attempts:
                    raise Failed(str(error), server.url, tried) from None
            else:
                self._well(server)
                return completion
            finally:
                server.outstanding -= 1
            avoided = server

    def _well(self, server: Server) -> None:
        server.succeeded()
        self._dark_since = None

    def _trouble(self, server: Server, error: Exception) -> None:
        server.failed()
        self._last_trouble = f"{server.url}: {error}"
        if self._dark_since is None and all(other.failures for other in self.servers):
            self._dark_since = time.monotonic()

    async def _taken(self, avoided: Server | None) -> Server:
        """The server with the fewest requests under way, with this one added; ``avoided`` only where there is no other.

        Raises:
            UserError: for a long time none has answered.
        """
        while True:
            free = [server for server in self.servers if server.takes(self.settings.concurrency)]
            if free:
                chosen = min(free, key=lambda server: (server is avoided, server.outstanding))
                chosen.outstanding += 1
                return chosen
            if self._dark_since is not None and time.monotonic() - self._dark_since > self.settings.patience:
                raise UserError(
                    f"engine.urls: no server has answered for {self.settings.patience:g} seconds "
                    f"({self._last_trouble}); what was answered is kept: start the same command when one does"
                )
            await asyncio.sleep(POLL_SECONDS)


def _stated(server: Server, protocol: Protocol) -> dict[str, Any]:
    stated = {"protocol": protocol.NAME, "target": protocol.model}
    return stated | ({"model_path": server.model_path} if server.model_path else {})


def _said(stated: dict[str, Any]) -> str:
    loaded = f", loaded from {stated['model_path']}" if "model_path" in stated else ""
    return f"{stated['target']} ({stated['protocol']}{loaded})"


def _described(model: ModelConfig) -> Path:
    """The target's directory, for which no weights are downloaded."""
    return prepare_tiny(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
