"""Head and loss in chunks of rows: logits, loss, choice and gradient of a chunk, one after the other.

The loss is a weighed sum over rows, so the gradient of a chunk is known as soon as its logits are: it is taken in
the forward pass, no more than a chunk of logits [rows, V_d] is ever alive, and nothing is computed twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_speculative.algorithms.common.schedule import Rows
from nemo_speculative.utils.precision import add_product_, exact

LOGITS_ALIVE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Entries of a chunk of logits: as few as a matrix product needs to run at full speed."""
LOGITS_JUDGED = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Entries of it that are judged at once: on a CPU as many as stay in the cache."""


@dataclass(frozen=True)
class Judged:
    """A chunk of rows, judged."""

    values: dict[str, torch.Tensor]
    """float32 [r] each: the parts of the loss of every row, not weighed; ``loss`` is what is minimised."""
    hit: torch.Tensor
    """bool [r]: the draft's choice is the target's."""
    gradient: torch.Tensor
    """[r, V_d]: of the weighed loss, with respect to the logits."""


class Judge(Protocol):
    """Knows the labels of a batch."""

    def labels(self, span: slice) -> Any:
        """Those of ``span`` of the batch's labels, from the target's outputs at their positions."""
        ...

    def judge(self, logits: torch.Tensor, labels: Any, part: slice) -> Judged:
        """Judges the logits [r, V_d] of ``part`` of the rows, whose labels are among ``labels``; may overwrite them."""
        ...


class Head(Protocol):
    """What makes logits of states, chunk by chunk."""

    @property
    def weight(self) -> torch.Tensor | None:
        """[V_d, h], where it is trained."""
        ...

    def start(self, rows: int, wanted: bool) -> None:
        """A pass over chunks of at most ``rows`` rows begins; whether gradients are ``wanted``."""
        ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[r, h] → [r, V_d], which may be overwritten."""
        ...

    def pull_back(self, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """Writes the gradient of the last states [r, h] from that of their logits [r, V_d]."""
        ...

    def finish(self) -> torch.Tensor | None:
        """The gradient of ``weight``."""
        ...


class LinearHead:
    """A head of the draft's own."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def start(self, rows: int, wanted: bool) -> None:
        # One buffer for all chunks: fresh pages of memory cost a CPU as much as filling them.
        self._buffer = self.weight.new_empty(rows, len(self.weight))
        self._total = torch.zeros_like(self.weight, dtype=exact(self.weight.dtype)) if wanted else None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        self._states = states
        return torch.mm(states, self.weight.T, out=self._buffer[: len(states)])

    def pull_back(self, gradient: torch.Tensor, into: torch.Tensor) -> None:
        torch.mm(gradient, self.weight, out=into)
        assert self._total is not None
        add_product_(self._total, gradient.T, self._states)

    def finish(self) -> torch.Tensor | None:
        total, self._total = self._total, None
        del self._buffer, self._states
        return total


class FrozenHead:
    """The target's head: whatever it does, only the states have a gradient."""

    weight = None

    def __init__(self, project: Callable[[torch.Tensor], torch.Tensor]):
        self.project = project

    def start(self, rows: int, wanted: bool) -> None:
        self._wanted = wanted

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self._wanted):
            self._states = states.detach().requires_grad_(self._wanted)
            self._logits = self.project(self._states)
        return self._logits.detach().clone() if self._wanted else self._logits

    def pull_back(self, gradient: torch.Tensor, into: torch.Tensor) -> None:
        (found,) = torch.autograd.grad(self._logits, self._states, gradient)
        into.copy_(found)

    def finish(self) -> torch.Tensor | None:
        del self._states, self._logits
        return None


def head_loss(
    states: torch.Tensor, head: Head, judge: Judge, rows: Rows, row_weight: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The weighed sum of the rows' losses.

    Args:
        states: [M, h], what the head reads.
        row_weight: float32 [M].
        vocabulary: V_d.

    Returns:
        The loss, a scalar with gradients to ``states`` and the head's weight; the values [M] of its parts; the hits,
        bool [M].
    """
    alive, judged = (limit[states.device.type] // vocabulary // 64 * 64 for limit in (LOGITS_ALIVE, LOGITS_JUDGED))
    parts = [(part, span) for chunk, span in rows.chunks for part in _slices(chunk, max(alive, 64))]
    judge = _InBlocks(judge, max(judged, 64))
    values: dict[str, torch.Tensor] = {}
    gradients = torch.is_grad_enabled()
    loss, hit = _HeadLoss.apply(states, head.weight, head, judge, parts, row_weight, values, gradients)
    return loss, values, hit


@dataclass(frozen=True)
class _InBlocks:
    """A judge at work on a few rows at a time; the gradient takes the place of the logits."""

    judge_of_few: Judge
    rows: int

    def labels(self, span: slice) -> Any:
        return self.judge_of_few.labels(span)

    def judge(self, logits: torch.Tensor, labels: Any, part: slice) -> Judged:
        made = []
        for block in _slices(part, self.rows):
            few = logits[block.start - part.start : block.stop - part.start]
            judged = self.judge_of_few.judge(few, labels, block)
            if judged.gradient.data_ptr() != few.data_ptr():
                few.copy_(judged.gradient)
            made.append(judged)
        values = {name: torch.cat([judged.values[name] for judged in made]) for name in made[0].values}
        return Judged(values, torch.cat([judged.hit for judged in made]), logits)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor | None, head: Head, judge: Judge,
        parts: list[tuple[slice, slice]], row_weight: torch.Tensor, values: dict[str, torch.Tensor], gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        # Under no_grad too, a weight that is trained says that it needs one.
        wanted = gradients and any(ctx.needs_input_grad)
        grad_states = torch.empty_like(states) if wanted else None
        head.start(max(part.stop - part.start for part, _ in parts), wanted)
        made, labels, of = [], None, None
        for part, span in parts:
            if span != of:
                labels, of = judge.labels(span), span
            judged = judge.judge(head.logits(states[part]), labels, part)
            made.append((judged.values, judged.hit))
            if grad_states is not None:
                head.pull_back(judged.gradient, grad_states[part])
        ctx.save_for_backward(grad_states, head.finish())
        ctx.dtype = None if weight is None else weight.dtype
        values.update({name: torch.cat([found[name] for found, _ in made]) for name in made[0][0]})
        hit = torch.cat([found for _, found in made])
        ctx.mark_non_differentiable(hit)
        return (values["loss"] * row_weight).sum(), hit

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        upstream = gradients[0]
        # In place: nobody reads them again, and the weight's is as large as the head.
        to_weight = None if grad_weight is None else grad_weight.mul_(upstream).to(ctx.dtype)
        return grad_states.mul_(upstream), to_weight, None, None, None, None, None, None


def _slices(whole: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))
