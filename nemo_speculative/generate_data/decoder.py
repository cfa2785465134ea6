"""Continuous batching for a :class:`HFTarget`: finished rows leave the batch, and waiting prompts take their slots.

Notable choices:
- a finished row keeps its slot, computed but unused, until an eighth of the batch is finished: the caches are
  copied when rows leave or join;
- prompts join several at a time, sorted by length: one prefill for all, with little padding;
- each request draws its tokens from a generator with its own seed, so an answer is independent of its batch, up to the
  rounding of the model's sums, which depends on the batch.
"""

import asyncio
import random
from collections.abc import Sequence

import torch

from nemo_speculative.decoding.drafters import NoDrafter
from nemo_speculative.decoding.engine import Batch, Row
from nemo_speculative.decoding.verify import Greedy, Sampling, SeededSampling, Verifier
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError

REFILL_SHARE = 1 / 8
"""Share of the slots that must be free or finished before rows join or leave."""
PREFILL_TOKENS = 1 << 14
"""Most tokens of one prefill, including padding."""


class _RequestRow(Row):
    """A request in the batch, or waiting for a slot."""

    def __init__(self, request: Request):
        super().__init__(request.prompt, request.limit)
        self.future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.rng = random.Random(request.seed)


class Decoder:
    """Answers of ``target``, up to ``size`` at once; each up to its limit, or a stop token, which it includes.

    Raises:
        UserError: the target cannot be decoded in rows of different lengths.
    """

    def __init__(self, target: HFTarget, size: int, sampling: Sampling):
        self.size, self.sampling = size, sampling
        self._waiting: list[_RequestRow] = []
        self._batch = Batch[_RequestRow](target, NoDrafter(), self._verifier, target.stop_ids)
        self._task: asyncio.Task[None] | None = None

    def _verifier(self, rows: Sequence[_RequestRow]) -> Verifier:
        if self.sampling.temperature == 0:
            return Greedy()
        return SeededSampling(self.sampling, [row.rng for row in rows])

    async def complete(self, request: Request) -> Completion:
        """The completion of ``request``; concurrent calls are decoded together.

        Raises:
            UserError: the device's memory is too small.
        """
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


def num_in_flight(batch_size: int) -> int:
    """Conversations kept in flight: 2x the batch, so that a freed slot is refilled with a prompt of similar length."""
    return 2 * batch_size
