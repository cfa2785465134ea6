"""Who is supervised: slot t, step i of the EAGLE unroll.

Right after the target emitted x_{t+1} the draft runs at slot t, and its chain predicts x_{t+2}, x_{t+3}, ….  So slot t
is supervised at step i when x_{t+1}, …, x_{t+2+i} are all the assistant's, in one document ("serving").  The other two
conventions reproduce published frameworks, for comparison:

- official (SafeAILab/EAGLE, SpecForge): the mask is not shifted with label and token, m[t+i].  The first drafted token
  of an answer is never trained, two labels past its end are.
- automodel (NeMo AutoModel): shifted by one, m[t+1+i].  One label past the end is trained.
"""

from dataclasses import dataclass

import torch

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import Batch

SHAPE_MULTIPLE = 64


@dataclass(frozen=True)
class Slots:
    """The slots of a batch that any step supervises, row by row; S is the largest number in a row."""

    index: torch.Tensor
    """int64 [B, S]: position of the slot in its row (0 where a row has fewer than S)."""
    supervised: torch.Tensor
    """bool [T, B, S]."""

    @property
    def counts(self) -> torch.Tensor:
        """float64 [T]: supervised slots at each step."""
        return self.supervised.sum((1, 2)).double()


def supervised_slots(batch: Batch, num_steps: int, convention: MaskConvention) -> Slots:
    """The slots of ``batch`` for an unroll of ``num_steps`` steps."""
    dense = supervision_mask(batch.loss_mask, batch.documents, num_steps, convention)
    used = dense.any(0)
    width = min(round_up(max(int(used.sum(1).max()), 1)), used.shape[1])
    # A stable sort of "unused" brings the used slots to the front, in order.
    index = (~used).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
    supervised = dense.gather(2, index.expand(num_steps, -1, -1))
    return Slots(torch.where(used.gather(1, index), index, 0), supervised)


def round_up(count: int) -> int:
    """The next multiple of 64: oneDNN builds and keeps a primitive for every shape that it meets."""
    return -(-count // SHAPE_MULTIPLE) * SHAPE_MULTIPLE


def rounded_indices(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``mask`` bool [N] holds, padded with index 0 to a rounded length, and which entries are real.

    Returns:
        int64 [M], bool [M].
    """
    found = mask.nonzero().squeeze(1)
    index = torch.nn.functional.pad(found, (0, round_up(max(len(found), 1)) - len(found)))
    return index, torch.arange(len(index), device=mask.device) < len(found)


def supervision_mask(
    loss_mask: torch.Tensor, documents: torch.Tensor, num_steps: int, convention: MaskConvention
) -> torch.Tensor:
    """bool [T, B, L] from ``loss_mask`` bool [B, L] and ``documents`` int64 [B, L]."""
    same = [_ahead(documents, 2 + i, -1) == documents for i in range(num_steps)]
    if convention is MaskConvention.official:
        return torch.stack([_ahead(loss_mask, i, False) & same[i] for i in range(num_steps)])
    if convention is MaskConvention.automodel:
        return torch.stack([_ahead(loss_mask, 1 + i, False) & same[i] for i in range(num_steps)])
    unbroken, steps = _ahead(loss_mask, 1, False), []
    for i in range(num_steps):
        unbroken = unbroken & _ahead(loss_mask, 2 + i, False) & same[i]
        steps.append(unbroken)
    return torch.stack(steps)


def _ahead(x: torch.Tensor, n: int, fill: int | bool) -> torch.Tensor:
    """y[:, t] = x[:, t + n], and ``fill`` past the end."""
    return torch.nn.functional.pad(x[:, n:], (0, min(n, x.shape[1])), value=fill)
