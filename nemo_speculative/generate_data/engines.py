"""The interface to a target that answers, and the implementation in this process, through transformers."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import HFEngineConfig, ModelConfig
from nemo_speculative.data.chat_template import tokenizer_digest
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.decoder import Decoder, num_in_flight
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.describe import load_tokenizer, stop_ids_of, text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError


class CompletionFailed(UserError):
    """A request that was given up: it is recorded, and the next run repeats it.

    Args:
        reason: the same text for all requests that failed in the same way; reports count by it.
        detail: further information on this request.
        attempts: how often the request was sent.
    """

    def __init__(self, reason: str, detail: str = "", attempts: int = 1):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.attempts = reason, detail, attempts


class Engine(ABC):
    """Completes prompts with the target in ``directory``, whose tokenizer and configuration it loads at once.

    Call :meth:`identity` first, :meth:`prepare` before the first request, and :meth:`close` at the end.

    Raises:
        UserError: the directory holds no usable tokenizer or configuration.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False):
        self.directory, self.trust_remote_code = directory, trust_remote_code
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.config = text_config(directory, trust_remote_code)
        self.context: int = self.config.max_position_embeddings
        """Tokens of the longest sequence."""
        self.stop_ids = stop_ids_of(directory, self.config, self.tokenizer)

    @property
    @abstractmethod
    def concurrency(self) -> int:
        """Conversations to keep in flight."""

    @abstractmethod
    async def identity(self) -> dict[str, Any]:
        """The engine's part of the manifest: everything in it that answers depend on.

        Raises:
            UserError: no server answers, or they serve different models.
        """

    @abstractmethod
    async def complete(self, request: Request) -> Completion:
        """The completion of ``request``.

        Raises:
            CompletionFailed: this request was given up.
            UserError: no further request will succeed either.
        """

    def prepare(self) -> None:  # noqa: B027
        """Loads what completing needs, however long it takes; by default nothing."""

    async def close(self) -> None:  # noqa: B027
        """Closes connections; by default there are none."""

    def rendering(self) -> dict[str, Any]:
        """The tokenizer's part of the manifest: the values that determine prompts and the ends of answers."""
        return {"tokenizer": tokenizer_digest(self.tokenizer), "stop_ids": sorted(self.stop_ids)}


class HFEngine(Engine):
    """The target in this process.  :meth:`prepare` loads the weights: a finished run needs none."""

    def __init__(self, config: HFEngineConfig, model: ModelConfig, sampling: Sampling):
        super().__init__(get_method(model._target_)(model), model.trust_remote_code)
        self.settings, self.dtype, self.sampling = config, model.dtype.value, sampling
        self._decoder: Decoder | None = None

    @property
    def concurrency(self) -> int:
        return num_in_flight(self.settings.batch_size)

    async def identity(self) -> dict[str, Any]:
        return {"engine": "hf", "target": target_fingerprint(self.directory), "dtype": self.dtype}

    async def complete(self, request: Request) -> Completion:
        assert self._decoder is not None
        return await self._decoder.complete(request)

    def prepare(self) -> None:
        target = HFTarget(
            self.directory,
            aux_layers=[],
            attn_implementation=self.settings.attn_implementation,
            dtype=getattr(torch, self.dtype),
            device=choose_device(self.settings.device, "engine.device"),
            trust_remote_code=self.trust_remote_code,
        )
        self._decoder = Decoder(target, self.settings.batch_size, self.sampling)
