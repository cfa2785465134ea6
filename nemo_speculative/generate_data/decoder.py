"""Many answers of a :class:`HFTarget` at a time: what is finished leaves the batch, and others come in.

Notable choices:
- keys and values are written in place and each row has a length of its own, so that a row can come in at any time;
- a row that is finished keeps its place, and is computed on for nothing, until there are several of them;
- prompts come in some at a time, by length: one prefill of several, and no long row of padding;
- a sampled token is where a uniform number lies in the cumulated distribution (inverse transform sampling).  The
  numbers come from the request's own seed, so that an answer does not depend on what is beside it: up to the rounding
  of the model's sums, which is the batch's.
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

WORTH_IT = 1 / 8
"""Share of the places that have to change hands for the cache, which is copied then, to be touched."""
PREFILL_TOKENS = 1 << 14
"""Of one prefill, padding included."""


@dataclass
class _Row:
    request: Request
    answered: asyncio.Future[Completion]
    draws: random.Random
    ids: list[int] = field(default_factory=list)
    going: bool = True


class Decoder:
    """Answers of ``target``, up to ``size`` at once; each up to its limit, or a stop token, which it includes.

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
        """The answer to ``request``; as many as wait for theirs are decoded together.

        Raises:
            UserError: the device's memory is too small.
        """
        row = _Row(request, asyncio.get_running_loop().create_future(), random.Random(request.seed))
        self._waiting.append(row)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._decode())
        return await row.answered

    async def _decode(self) -> None:
        try:
            while self._waiting or self._rows:
                await asyncio.sleep(0)  # who was answered asks on
                self._step()
        except Exception as error:
            for row in [*self._waiting, *self._rows]:
                if not row.answered.done():
                    row.answered.set_exception(_explained(error, self.size))
            self._waiting, self._rows, self._model = [], [], None

    @torch.inference_mode()
    def _step(self) -> None:
        if self._waiting and _worth_it(self.size - self._num_going, self.size):
            self._come_in(self.size - self._num_going)
        else:
            self._extend()

    @property
    def _num_going(self) -> int:
        return sum(row.going for row in self._rows)

    def _come_in(self, free: int) -> None:
        self._waiting.sort(key=lambda row: len(row.request.prompt))
        new = self._waiting[: self._fitting(free)]
        model = CachedTarget(self.target, len(new))
        logits = self.target.logits(model.prefill([row.request.prompt for row in new]).last())
        del self._waiting[: len(new)]
        self._take(new, logits[:, -1])
        self._leave()
        if self._model is None:
            self._model = model
        else:
            self._model.join(model)
        self._rows += new

    def _fitting(self, free: int) -> int:
        """How many of those that wait come in at once; the last of them is the longest."""
        lengths = [len(row.request.prompt) for row in self._waiting[:free]]
        return max([1, *(n for n, length in enumerate(lengths, start=1) if n * length <= PREFILL_TOKENS)])

    def _extend(self) -> None:
        if _worth_it(len(self._rows) - self._num_going, len(self._rows)):
            self._leave()
        if self._model is None:
            return
        last = torch.tensor([row.ids[-1:] for row in self._rows], device=self.target.device)
        states = self._model.read(chains(last))
        self._model.keep([[0]] * len(self._rows))
        self._take(self._rows, self.target.logits(states.last_hidden_state)[:, -1])

    def _leave(self) -> None:
        """Frees the places of the rows that are finished."""
        going = [number for number, row in enumerate(self._rows) if row.going]
        if self._model is not None and len(going) < len(self._rows):
            self._rows = [self._rows[number] for number in going]
            self._model.select(going)
        if not going:
            self._model = None

    def _take(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Adds a token to each row that is not finished.  Logits [B, V]."""
        for row, token in zip(rows, self._chosen(rows, logits), strict=True):
            if not row.going:
                continue
            row.ids.append(token)
            stopped = token in self.target.stop_ids
            row.going = not stopped and len(row.ids) < row.request.limit
            if not row.going and not row.answered.done():  # or nobody waits any more
                row.answered.set_result(Completion(row.ids, stopped))

    def _chosen(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[int]:
        if self.sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        uniform = torch.tensor([row.draws.random() for row in rows], dtype=torch.float64, device=logits.device)
        return inverse_transform(self.sampling.probabilities(logits), uniform).tolist()


def _worth_it(changing: int, places: int) -> bool:
    return changing >= WORTH_IT * places


def num_in_flight(batch_size: int) -> int:
    """Conversations for a batch: some wait, so that a place that becomes free is taken by one of a like length."""
    return 2 * batch_size


def inverse_transform(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws from each distribution: [B, V] and float64 [B] in [0, 1) → int64 [B].

    The first token at which the cumulated probability exceeds the number, so never one without any.
    """
    cumulated = probabilities.double().cumsum(-1)
    found = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)


def _explained(error: Exception, size: int) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"engine.batch_size is {size}: too many for the device's memory; lower it")
    return error
