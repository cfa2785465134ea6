"""The causal block by torch's flex attention: one kernel over block-sparse queries and keys, for CUDA.

The block structure is computed on the host from the ranges that queries see; a mask [n, m] is never made.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nemo_speculative.algorithms.common.attention import Pair
from nemo_speculative.utils.devices import send

BLOCK = 128


@dataclass(frozen=True)
class FlexBlock:
    """See the module's text."""

    order: torch.Tensor
    """int64 [n]: the queries in ascending order of position."""
    back: torch.Tensor
    """int64 [n]: its inverse."""
    mask: BlockMask

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        sorted_q = q[self.order].transpose(0, 1)[None]
        attention = _compiled() if q.is_cuda else flex_attention
        out, aux = attention(
            sorted_q, keys[None], values[None], block_mask=self.mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return out[0].transpose(0, 1)[self.back], aux.lse[0].transpose(0, 1)[self.back].float()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_block(
    order: torch.Tensor, first: torch.Tensor, last: torch.Tensor, num_keys: int, device: torch.device
) -> FlexBlock:
    """For queries that see the keys ``first`` to ``last``, int64 [n] each, on the host, ascending."""
    partial, full = _block_structure(first, last, num_keys)
    first, last = send(first, device), send(last, device)

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[query]) & (key <= last[query])

    counts, blocks, full_counts, full_blocks = (send(x, device) for x in (*_indices(partial), *_indices(full)))
    mask = BlockMask.from_kv_blocks(
        counts, blocks, full_counts, full_blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(first), num_keys)
    )
    return FlexBlock(send(order, device), send(order.argsort(), device), mask)


def _block_structure(first: torch.Tensor, last: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [query blocks, key blocks] each: some of the block may be seen, and all of it is."""
    rows, cols = -(-len(first) // BLOCK), -(-num_keys // BLOCK)
    spare = rows * BLOCK - len(first)
    starts, ends = (torch.cat((x, x[-1:].expand(spare))).view(rows, BLOCK) for x in (first, last))
    low = torch.arange(cols) * BLOCK
    high = low + BLOCK - 1
    some = (low <= ends.amax(1)[:, None]) & (high >= starts.amin(1)[:, None])
    whole = (low >= starts.amax(1)[:, None]) & (high <= ends.amin(1)[:, None])
    return some & ~whole, whole


def _indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, and which: int32 [1, 1, rows] and [1, 1, rows, cols]."""
    order = (~blocks).to(torch.uint8).sort(dim=1, stable=True).indices
    return blocks.sum(1).int()[None, None], order.int()[None, None]
