"""The interface to a target that answers, and the engine in this process: continuous batching of transformers."""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import HFEngineConfig, ModelConfig
from nemo_speculative.decoding.drafters import NoDrafter
from nemo_speculative.decoding.engine import Batch, Row
from nemo_speculative.decoding.verify import Greedy, Sampling, SeededSampling, Verifier
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.describe import load_tokenizer, stop_ids_of, text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError

IN_FLIGHT = 2
"""Conversations in flight for each slot of a batch, so that a freed one is refilled with a prompt of similar length."""
REFILL_SHARE = 1 / 8
"""Share of the slots that must be free or finished before rows join or leave."""
PREFILL_TOKENS = 1 << 14
"""Most tokens of one prefill, including padding."""


class CompletionFailed(UserError):
    """A request that was given up after ``attempts``: it is recorded, and the next run repeats it.

    Reports count by ``reason``, the same text for all that failed in the same way; ``detail`` is about this one.
    """

    def __init__(self, reason: str, detail: str = "", attempts: int = 1):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.attempts = reason, detail, attempts


class Engine(ABC):
    """Completes prompts with the target in ``directory``, whose tokenizer and configuration it loads at once.

    Call :meth:`identity` first, :meth:`prepare` before the first request, and :meth:`close` at the end.  Callers keep
    ``concurrency`` conversations in flight.  Raises UserError if the directory has no usable tokenizer.
    """

    def __init__(self, directory: Path, trust_remote_code: bool, concurrency: int):
        self.directory, self.trust_remote_code, self.concurrency = directory, trust_remote_code, concurrency
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.config = text_config(directory, trust_remote_code)
        self.context: int = self.config.max_position_embeddings
        """Tokens of the longest sequence."""
        self.stop_ids = stop_ids_of(directory, self.config, self.tokenizer)

    @abstractmethod
    async def identity(self) -> dict[str, Any]:
        """The engine's part of the manifest: everything in it that answers depend on."""

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


class HFEngine(Engine):
    """The target in this process.  :meth:`prepare` loads the weights: a finished run needs none."""

    def __init__(self, config: HFEngineConfig, model: ModelConfig, sampling: Sampling):
        super().__init__(get_method(model._target_)(model), model.trust_remote_code, IN_FLIGHT * config.batch_size)
        self.settings, self.dtype, self.sampling = config, model.dtype.value, sampling
        self._decoder: Decoder | None = None

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


class _RequestRow(Row):
    """A request in the batch, or waiting for a slot."""

    def __init__(self, request: Request):
        super().__init__(request.prompt, request.limit)
        self.future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.rng = random.Random(request.seed)


class Decoder:
    """Answers of ``target``, up to ``size`` at once; each up to its limit, or a stop token, which it includes.

    Notable choices:
    - a finished row keeps its slot, computed but unused, until an eighth of the batch is finished: the caches are
      copied when rows leave or join;
    - prompts join several at a time, sorted by length: one prefill for all, with little padding;
    - each request draws its tokens from a generator with its own seed, so an answer is independent of its batch, up to
      the rounding of the model's sums, which depends on the batch.

    Raises:
        UserError: the target cannot be decoded in rows of different lengths.
    """

    def __init__(self, target: HFTarget, size: int, sampling: Sampling):
        self.size, self.sampling = size, sampling
        self._waiting: list[_RequestRow] = []
        self._batch = Batch[_RequestRow](target, NoDrafter(), self._verifier, target.stop_ids)
        self._task: asyncio.Task[None] | None = None

    def _verifier(self, rows: Sequence[_RequestRow]) -> Verifier:
        return SeededSampling(self.sampling, [row.rng for row in rows]) if self.sampling.temperature else Greedy()

    async def complete(self, request: Request) -> Completion:
        """The completion of ``request``; concurrent calls are decoded together."""
        row = _RequestRow(request)
        self._waiting.append(row)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._decode())
        return await row.future

    async def _decode(self) -> None:
        try:
            while self._waiting or self._batch.rows:
                await asyncio.sleep(0)  # lets callers with a finished answer send their next request
                self._step()
                for row in self._batch.rows:
                    if row.done and not row.future.done():  # the future of a canceled caller is done
                        row.future.set_result(Completion(row.answer, row.stopped))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = UserError(f"engine.batch_size is {self.size}: too many for the device's memory; lower it")
            for row in [*self._waiting, *self._batch.rows]:
                if not row.future.done():
                    row.future.set_exception(error)
            self._waiting = []
            self._batch.clear()

    def _step(self) -> None:
        """Prefills waiting prompts if enough slots are free; decodes one token otherwise."""
        rows = self._batch.rows
        num_active = sum(not row.done for row in rows)
        free = self.size - num_active
        if self._waiting and free >= REFILL_SHARE * self.size:
            self._waiting.sort(key=lambda row: row.num_prompt_tokens)
            lengths = [row.num_prompt_tokens for row in self._waiting[:free]]  # ascending: the last sets the padding
            count = max([1, *(n for n, length in enumerate(lengths, start=1) if n * length <= PREFILL_TOKENS)])
            self._batch.admit(self._waiting[:count])
            del self._waiting[:count]
            return
        if len(rows) - num_active >= REFILL_SHARE * len(rows):
            self._batch.release()
        if self._batch.rows:
            self._batch.step()
