"""Continuous batching for a :class:`HFTarget`: finished rows leave the batch, and waiting prompts take their slots.

Notable choices:
- keys and values are written in place and each row has its own length, so a row can join at any time;
- a finished row keeps its slot, and is computed along unused, until several of them can be removed at once;
- prompts join several at a time, sorted by length: one prefill for all, with little padding;
- a token is sampled by inverse transform: it is where a uniform number falls in the cumulative distribution.  The
  numbers come from the request's own seed, so an answer is independent of its batch, up to the rounding of the
  model's sums, which depends on the batch.

:mod:`nemo_speculative.decoding.engine` decodes a fixed batch with a draft; drafters cannot join a running batch.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.trees import chains
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError

REFILL_SHARE = 1 / 8
"""Share of the slots that must change before the key-value cache, which is copied for that, is changed."""
PREFILL_TOKENS = 1 << 14
"""Of one prefill, including padding."""


@dataclass
class _Row:
    request: Request
    future: asyncio.Future[Completion]
    rng: random.Random
    ids: list[int] = field(default_factory=list)
    active: bool = True


class Decoder:
    """Completes requests with ``target``, up to ``size`` at a time, each up to its limit or a stop token (included).

    Raises:
        UserError: the target cannot be decoded in rows of different lengths.
    """

    def __init__(self, target: HFTarget, size: int, sampling: Sampling):
        self.target, self.size, self.sampling = target, size, sampling
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._model: CachedTarget | None = None
        self._task: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Completion:
        """The completion of ``request``; concurrent calls are decoded together.

        Raises:
            UserError: the device's memory is too small.
        """
        row = _Row(request, asyncio.get_running_loop().create_future(), random.Random(request.seed))
        self._waiting.append(row)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._decode())
        return await row.future

    async def _decode(self) -> None:
        try:
            while self._waiting or self._rows:
                await asyncio.sleep(0)  # lets callers with a finished answer send their next request
                self._step()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = UserError(f"engine.batch_size is {self.size}: too many for the device's memory; lower it")
            for row in [*self._waiting, *self._rows]:
                if not row.future.done():
                    row.future.set_exception(error)
            self._waiting, self._rows, self._model = [], [], None

    @torch.inference_mode()
    def _step(self) -> None:
        """Prefills waiting prompts if enough slots are free; decodes one token otherwise."""
        free = self.size - sum(row.active for row in self._rows)
        if self._waiting and free >= REFILL_SHARE * self.size:
            self._prefill(free)
        else:
            self._decode_token()

    def _prefill(self, free: int) -> None:
        self._waiting.sort(key=lambda row: len(row.request.prompt))
        lengths = [len(row.request.prompt) for row in self._waiting[:free]]  # ascending: the last sets the padding
        count = max([1, *(n for n, length in enumerate(lengths, start=1) if n * length <= PREFILL_TOKENS)])
        new = self._waiting[:count]
        model = CachedTarget(self.target, len(new))
        logits = self.target.logits(model.prefill([row.request.prompt for row in new]).last())
        del self._waiting[:count]
        self._add_tokens(new, logits[:, -1])
        self._remove_finished()
        if self._model is None:
            self._model = model
        else:
            self._model.join(model)
        self._rows += new

    def _decode_token(self) -> None:
        finished = sum(not row.active for row in self._rows)
        if finished >= REFILL_SHARE * len(self._rows):
            self._remove_finished()
        if self._model is None:
            return
        last = torch.tensor([row.ids[-1:] for row in self._rows], device=self.target.device)
        states = self._model.read(chains(last))
        self._model.keep([[0]] * len(self._rows))
        self._add_tokens(self._rows, self.target.logits(states.last_hidden_state)[:, -1])

    def _remove_finished(self) -> None:
        active = [number for number, row in enumerate(self._rows) if row.active]
        if self._model is not None and len(active) < len(self._rows):
            self._rows = [self._rows[number] for number in active]
            self._model.select(active)
        if not active:
            self._model = None

    def _add_tokens(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Adds a token to each active row.  Logits [B, V]."""
        if self.sampling.temperature == 0:
            tokens = logits.argmax(-1).tolist()
        else:
            uniform = torch.tensor([row.rng.random() for row in rows], dtype=torch.float64, device=logits.device)
            tokens = inverse_transform(self.sampling.probabilities(logits), uniform).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if not row.active:
                continue
            row.ids.append(token)
            stopped = token in self.target.stop_ids
            row.active = not stopped and len(row.ids) < row.request.limit
            if not row.active and not row.future.done():  # a cancelled caller's future is done
                row.future.set_result(Completion(row.ids, stopped))


def num_in_flight(batch_size: int) -> int:
    """Conversations kept in flight: 2x the batch, so that a freed slot is refilled with a prompt of similar length."""
    return 2 * batch_size


def inverse_transform(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws from each distribution: [B, V] and float64 [B] in [0, 1) → int64 [B].

    The first token at which the cumulative probability exceeds the number, so never one with probability zero.
    """
    cumulative = probabilities.double().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=probabilities.shape[-1] - 1)
