"""Causal blocks from positions: which step-0 keys each query sees, in the form that the device's attention takes.

A query at flat position t of a document that starts at s sees the keys s … t.  On a CPU the block is a few matrix
products (:class:`.attention.PieceBlock`), on CUDA torch's flex attention: one kernel over block-sparse queries and
keys, whose block structure is computed on the host from the ranges; a mask [n, m] is never made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nemo_speculative.algorithms.common.attention import CausalBlock, Pair, Piece, PieceBlock
from nemo_speculative.utils.devices import to_device

PIECE_QUERIES = 128
PIECE_SCORES = 1 << 19
"""Scores of one head in memory at once, before keys are rounded up: 128 queries over 4096 keys.

Over more than 16384 keys a piece of the fewest queries (``PIECE_ROUNDING``) has more.
"""
PIECE_ROUNDING = 32
"""Queries and keys of a piece are rounded up to a multiple: oneDNN builds and keeps a primitive for every shape."""
PIECE_COST = 1 << 13
"""The fixed cost of a piece, in scores: the dispatch of some twenty small operations."""
FLEX_BLOCK = 128
"""Queries and keys of a block of flex attention's block mask."""
WIDE_GAP = 64
"""Distance of two queries from which on they are cheaper in two pieces."""


def block_for(positions: torch.Tensor, index: torch.Tensor, device: torch.device) -> CausalBlock:
    """The keys that the queries at flat positions ``index`` see, for attention on ``device``.

    Args:
        positions: int64 [m], on the host: the position of every key in its document.
        index: int64 [n], on the host, in any order.
    """
    order = index.argsort(stable=True)
    last = index[order]
    first = last - positions[last]
    if device.type == "cuda":
        return flex_block(order, first, last, len(positions), device)
    return _piece_block(order, first, last, len(positions), device)


def _piece_block(
    order: torch.Tensor, first: torch.Tensor, last: torch.Tensor, num_keys: int, device: torch.device
) -> PieceBlock:
    """The block of queries that see the keys ``first`` to ``last``, int64 [n] each, on the host, ascending."""
    spans, pieces = _merged(_spans(first, last)), []
    padded: list[torch.Tensor] = []
    for span in spans:
        start, size = PIECE_ROUNDING * len(padded), span.end - span.start
        # Padded with copies of the last query, whose outputs are not read.
        rows = torch.arange(span.start, span.start + _rounded(size, PIECE_ROUNDING)).clamp(max=span.end - 1)
        padded += rows.split(PIECE_ROUNDING)
        pieces.append(_piece(slice(start, start + len(rows)), span, first[rows], last[rows], num_keys, device))
    source = torch.cat(padded)
    inverse = torch.empty_like(order)
    # ``source`` ascends: of the copies of a query this finds the first.
    inverse[order] = torch.searchsorted(source, torch.arange(len(order)))
    return PieceBlock(to_device(order[source], device), to_device(inverse, device), tuple(pieces))


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def rounded_width(keys: int) -> int:
    """``keys`` rounded up, by at most an eighth: a long row has hundreds of pieces, each wider than the one before."""
    return _rounded(keys, max(PIECE_ROUNDING, 1 << max(keys.bit_length() - 4, 0)))


@dataclass(frozen=True)
class _Span:
    """Queries ``start`` to ``end`` (in ascending order) over keys ``low`` to ``high``."""

    start: int
    end: int
    low: int
    high: int

    @property
    def scores(self) -> int:
        return (self.end - self.start) * (self.high - self.low)

    def with_next(self, other: "_Span") -> "_Span":
        return _Span(self.start, other.end, min(self.low, other.low), max(self.high, other.high))


def _spans(first: torch.Tensor, last: torch.Tensor) -> Iterator[_Span]:
    """Runs of queries of one document without a wide gap, cut where they are long."""
    cut = (first[1:] != first[:-1]) | (last[1:] - last[:-1] > WIDE_GAP)
    bounds = [0, *(cut.nonzero().squeeze(1) + 1).tolist(), len(first)]
    for start, end in pairwise(bounds):
        low, high = int(first[start]), int(last[end - 1]) + 1
        # The fewest queries are rounded up to it: over 64k keys to four times as many.
        size = max(min(PIECE_QUERIES, PIECE_SCORES // (high - low)) // PIECE_ROUNDING, 1) * PIECE_ROUNDING
        for at in range(start, end, size):
            stop = min(at + size, end)
            yield _Span(at, stop, low, int(last[stop - 1]) + 1)


def _merged(spans: Iterator[_Span]) -> list[_Span]:
    """Merges neighbors into one piece wherever the unneeded scores cost less than a piece."""
    out: list[_Span] = []
    for span in spans:
        both = out[-1].with_next(span) if out else span
        fits = both.end - both.start <= PIECE_QUERIES and both.scores <= PIECE_SCORES
        if out and fits and both.scores <= out[-1].scores + span.scores + PIECE_COST:
            out[-1] = both
        else:
            out.append(span)
    return out


def _piece(
    queries: slice, span: _Span, first: torch.Tensor, last: torch.Tensor, num_keys: int, device: torch.device
) -> Piece:
    """The piece of ``span``, whose padded queries see the keys ``first`` to ``last``."""
    width = rounded_width(span.high - span.low)
    high = min(span.low + width, num_keys)
    low = max(high - width, 0)
    # Up to its first query a single document is visible to all.
    masked_from = int(last[0]) + 1 if bool((first == low).all()) else low
    mask = None
    if masked_from < high:
        keys = torch.arange(masked_from, high)
        visible = (keys >= first[:, None]) & (keys <= last[:, None])
        mask = to_device(torch.zeros(visible.shape).masked_fill_(~visible, float("-inf")), device)
    return Piece(queries, slice(low, high), mask)


@dataclass(frozen=True)
class FlexBlock:
    """The causal block under flex attention."""

    order: torch.Tensor
    """int64 [n]: the queries in ascending order of position."""
    inverse: torch.Tensor
    """int64 [n]: its inverse."""
    mask: BlockMask

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        sorted_q = q[self.order].transpose(0, 1)[None]
        attention = _compiled() if q.is_cuda else flex_attention
        out, aux = attention(
            sorted_q, keys[None], values[None], block_mask=self.mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return out[0].transpose(0, 1)[self.inverse], aux.lse[0].transpose(0, 1)[self.inverse].float()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_block(
    order: torch.Tensor, first: torch.Tensor, last: torch.Tensor, num_keys: int, device: torch.device
) -> FlexBlock:
    """The block of queries that see the keys ``first`` to ``last``, int64 [n] each, on the host, ascending."""
    partial, full = _block_structure(first, last, num_keys)
    first, last = to_device(first, device), to_device(last, device)

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[query]) & (key <= last[query])

    counts, blocks, full_counts, full_blocks = (to_device(x, device) for x in (*_indices(partial), *_indices(full)))
    mask = BlockMask.from_kv_blocks(
        counts,
        blocks,
        full_counts,
        full_blocks,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(len(first), num_keys),
    )
    return FlexBlock(to_device(order, device), to_device(order.argsort(), device), mask)


def _block_structure(first: torch.Tensor, last: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [query blocks, key blocks] each: partly visible blocks, and fully visible ones."""
    rows, cols = -(-len(first) // FLEX_BLOCK), -(-num_keys // FLEX_BLOCK)
    spare = rows * FLEX_BLOCK - len(first)
    starts, ends = (torch.cat((x, x[-1:].expand(spare))).view(rows, FLEX_BLOCK) for x in (first, last))
    low = torch.arange(cols) * FLEX_BLOCK
    high = low + FLEX_BLOCK - 1
    some = (low <= ends.amax(1)[:, None]) & (high >= starts.amin(1)[:, None])
    whole = (low >= starts.amax(1)[:, None]) & (high <= ends.amin(1)[:, None])
    return some & ~whole, whole


def _indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of key blocks of each query block, and which: int32 [1, 1, rows] and [1, 1, rows, cols]."""
    order = (~blocks).to(torch.uint8).sort(dim=1, stable=True).indices
    return blocks.sum(1).int()[None, None], order.int()[None, None]
