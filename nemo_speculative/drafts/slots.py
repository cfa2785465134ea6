"""The slots of an unroll: where they are, how many steps each one runs, and which keys it sees.

All of it follows from the batch alone, so it is made on the host, before any model runs.  The rows of a batch are laid
end to end: a document is a range of flat positions, and the number of rows appears nowhere.  Slots are sorted by the
number of their steps, so that those of a step are the first so many of the step before: a view, no gather.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from nemo_speculative.devices import send
from nemo_speculative.drafts.attention import Block
from nemo_speculative.drafts.blocks import block_for

SHAPE_MULTIPLE = 64


def round_up(count: int) -> int:
    """The next multiple of 64: oneDNN builds and keeps a primitive for every shape that it meets."""
    return -(-count // SHAPE_MULTIPLE) * SHAPE_MULTIPLE


@dataclass(frozen=True)
class Slots:
    """See the module's text.  N slots, those with the most steps first, filled up with copies of the last one."""

    host_index: torch.Tensor
    """int64 [N], on the host: flat position of each."""
    real: torch.Tensor
    """bool [N], on the host: not a copy."""
    alive: tuple[int, ...]
    """How many are computed at each step, rounded up."""
    index: torch.Tensor
    """int64 [N]: flat position of each."""
    places: torch.Tensor
    """int64 [N]: its position in its document."""
    blocks: tuple[Block, ...]
    """The step-0 keys that the slots of each step see."""
    positions: torch.Tensor
    """int64 [B * L]: of every token in its document."""
    host_positions: torch.Tensor
    """The same, on the host."""

    @classmethod
    def of(cls, positions: torch.Tensor, steps: torch.Tensor, device: torch.device) -> "Slots":
        """The slots of a batch.

        Args:
            positions: int64 [B, L], on the host, from 0 in every document.
            steps: int64 [B, L], on the host: how many steps the slot at each position runs; 0: none.
        """
        steps, flat = steps.flatten(), positions.flatten()
        order = steps.argsort(descending=True, stable=True)
        used = int((steps > 0).sum())
        kept = max(used, 1)
        index = torch.cat((order[:kept], order[kept - 1].expand(round_up(kept) - kept)))
        alive = tuple(round_up(max(int((steps > i).sum()), 1)) for i in range(max(int(steps.max()), 1)))
        blocks: dict[int, Block] = {n: block_for(flat, index[:n], device) for n in set(alive)}
        return cls(
            host_index=index,
            real=torch.arange(len(index)) < used,
            alive=alive,
            index=send(index, device),
            places=send(flat[index], device),
            positions=send(flat, device),
            blocks=tuple(blocks[n] for n in alive),
            host_positions=flat,
        )

    @cached_property
    def everywhere(self) -> Block:
        """The keys that each position of the batch sees: made when a draft of several layers first asks for them."""
        return block_for(self.host_positions, torch.arange(len(self.host_positions)), self.index.device)
