"""A loss that is a sum over parts of a batch, with no more than one part's activations alive.

Parts share the prefix (step-0 keys and values, tokens, features) and the weights.  The gradient of a part is taken as
soon as its loss is known, in the forward pass, and added up; nothing is computed twice.  What lies in front of the
prefix keeps its graph, and gets the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_speculative.algorithms.common.schedule import Part
from nemo_speculative.algorithms.common.ttt import Prefix
from nemo_speculative.utils.precision import exact

Sums = dict[str, torch.Tensor]
PartLoss = Callable[[Prefix, Part], tuple[torch.Tensor, Sums]]


def sum_of_parts(
    part_loss: PartLoss, prefix: Prefix, parts: Sequence[Part], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, Sums]:
    """The sums over ``parts`` of what ``part_loss`` gives for each.

    Args:
        part_loss: the loss of a part, given what its slots see of ``prefix``; and what else is to be added up.
        weights: the parameters that it reads.

    Returns:
        The loss, a scalar with gradients to ``prefix`` and ``weights``, and the other sums.
    """
    made: list[Sums] = []
    wanted = torch.is_grad_enabled()
    loss = _SumOfParts.apply(part_loss, prefix, parts, made, wanted, *prefix.tensors(), *weights)
    return loss, {name: torch.stack([sums[name] for sums in made]).sum(0) for name in made[0]}


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part_loss: PartLoss, prefix: Prefix, parts: Sequence[Part], made: list[Sums], wanted: bool,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        weights = tensors[len(prefix.tensors()) :]
        totals = prefix.like(_exact_zeros) if wanted else prefix
        of_weights: list[torch.Tensor | None] = [None for _ in weights]
        losses = []
        for part in parts:
            with torch.set_grad_enabled(wanted):
                seen = prefix.seen_by(part.slots).like(lambda x: x.detach().requires_grad_(x.requires_grad))
                loss, sums = part_loss(seen, part)
            losses.append(loss.detach())
            made.append(sums)
            if wanted:
                of_seen, of_these = _gradients(loss, seen.tensors(), weights)
                for total, gradient in zip(totals.seen_by(part.slots).tensors(), of_seen, strict=True):
                    if gradient is not None:
                        total += gradient
                of_weights = list(map(_sum, of_weights, of_these))
        ctx.save_for_backward(*totals.tensors(), *of_weights)
        ctx.dtypes = [x.dtype for x in tensors]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = gradients
        found = (
            # In place: it is as large as the draft's weights, and nobody reads it again.
            None if total is None else total.mul_(upstream).to(dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, None, None, None, *found)


def _gradients(loss: torch.Tensor, *groups: Sequence[torch.Tensor]) -> list[list[torch.Tensor | None]]:
    """Of ``loss`` with respect to each tensor of each group; None where it hangs on none."""
    inputs = [x for group in groups for x in group if x.requires_grad]
    found = iter(torch.autograd.grad(loss, inputs, allow_unused=True))
    return [[next(found) if x.requires_grad else None for x in group] for group in groups]


def _exact_zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=exact(x.dtype))


def _sum(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if gradient is None:
        return total
    term = gradient.to(exact(gradient.dtype))
    return term if total is None else total + term
