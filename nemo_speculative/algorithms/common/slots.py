"""The slots of an unroll: where they are, how many steps each one runs, and what of the batch they read.

All of it follows from the batch alone, so it is made on the host, before any model runs.  The rows of a batch are laid
end to end: a document is a range of flat positions, and the number of rows appears nowhere.  Slots are sorted by the
number of their steps, so that those of a step are the first so many of the step before: a view, no gather.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from nemo_speculative.algorithms.common.attention import Block
from nemo_speculative.algorithms.common.blocks import block_for, rounded_width
from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import send

SHAPE_MULTIPLE = 64


def round_up(count: int, multiple: int = SHAPE_MULTIPLE) -> int:
    """The next ``multiple``: oneDNN builds and keeps a primitive for every shape that it meets."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand in their documents, and which of them are computed here."""

    host_positions: torch.Tensor
    """int64 [B * L], on the host: from 0 in every document."""
    positions: torch.Tensor
    """int64 [m], on the device: of those of the share, as the draft's rotary embedding is told, which may differ."""
    shard: ContextShard

    @classmethod
    def of(cls, host: torch.Tensor, there: torch.Tensor, shard: ContextShard = FULL_BATCH) -> "Layout":
        """Of positions int64 [B, L], on the host and on the device."""
        return cls(host.flatten(), shard.local(there).flatten(), shard)

    @cached_property
    def block(self) -> Block:
        """The keys that each position sees: made when a draft of several layers first asks for them."""
        index = self.shard.to_global(torch.arange(len(self.positions)))
        return block_for(self.host_positions, index, self.positions.device)


@dataclass(frozen=True)
class Slots:
    """See the module's text.  N slots, those with the most steps first, filled up with copies of the last one."""

    host_index: torch.Tensor
    """int64 [N], on the host: position of each, in the share."""
    real: torch.Tensor
    """bool [N], on the host: not a copy."""
    alive: tuple[int, ...]
    """How many are computed at each step, rounded up."""
    reads: slice
    """The positions in the share whose tokens and features they read."""
    keys: slice
    """The flat positions whose step-0 keys they see, and some more."""
    index: torch.Tensor
    """int64 [N]: position of each, within ``reads``."""
    places: torch.Tensor
    """int64 [N]: what the draft's rotary embedding is told of its position."""
    blocks: tuple[Block, ...]
    """What of ``keys`` the slots of each step see."""

    @classmethod
    def of(
        cls, positions: torch.Tensor, steps: torch.Tensor, device: torch.device, shard: ContextShard = FULL_BATCH,
        told: torch.Tensor | None = None,
    ) -> "Slots":  # fmt: skip
        """The slots of a batch, or some of them.

        Args:
            positions: int64 [B, L], on the host, from 0 in every document.
            steps: int64 [B, L], or [m] of the share, on the host: how many steps the slot at each position runs; 0:
                none.
            told: int64 [B, L], on the host: the positions that the rotary embedding is told; None: ``positions``.
        """
        steps, flat = steps.flatten(), positions.flatten()
        used = steps.nonzero()[:, 0]
        own = steps[used]
        order = used[own.argsort(descending=True, stable=True)] if len(used) else torch.zeros(1, dtype=torch.long)
        index = torch.cat((order, order[-1:].expand(round_up(len(order)) - len(order))))
        longest = int(own.max()) if len(used) else 1
        alive = tuple(round_up(max(int((own > i).sum()), 1)) for i in range(longest))
        first, end = int(index.min()), int(index.max()) + 1
        reads = slice(first, min(end + len(alive), len(steps)))
        at = shard.to_global(index)
        lowest, behind = int(at.min()), int(at.max()) + 1
        start = lowest - int(flat[lowest])
        keys = slice(start, min(start + rounded_width(behind - start), len(flat)))
        blocks: dict[int, Block] = {n: block_for(flat[keys], at[:n] - start, device) for n in set(alive)}
        return cls(
            host_index=index,
            real=torch.arange(len(index)) < len(used),
            alive=alive,
            reads=reads,
            keys=keys,
            index=send(index - first, device),
            places=send((flat if told is None else told.flatten())[at], device),
            blocks=tuple(blocks[n] for n in alive),
        )
