"""Which step-0 keys the queries of an unroll see, in the form that the device's attention takes.

A query at flat position t of a document that starts at s sees the keys s … t.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from nemo_speculative.algorithms.common.attention import Block, Piece, PieceBlock
from nemo_speculative.algorithms.common.flex import flex_block
from nemo_speculative.utils.devices import send

PIECE_QUERIES = 128
PIECE_SCORES = 1 << 19
"""Scores of one head that are alive at once: 128 queries over 4096 keys.

Before keys are filled up; and behind more than 16384 keys a piece of the fewest queries (``PIECE_ROUNDING``) has more.
"""
PIECE_ROUNDING = 32
"""Queries and keys of a piece are filled up to a multiple: oneDNN builds and keeps a primitive for every shape."""
PIECE_COST = 1 << 13
"""What a piece costs beside its scores, in scores: the dispatch of some twenty small operations."""
WIDE_GAP = 64
"""Positions between two queries from which on they are cheaper in two pieces."""


def block_for(positions: torch.Tensor, index: torch.Tensor, device: torch.device) -> Block:
    """What the queries at flat positions ``index`` see, for attention on ``device``.

    Args:
        positions: int64 [m], on the host: of every key in its document.
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
    """For queries that see the keys ``first`` to ``last``, int64 [n] each, on the host, ascending."""
    spans, pieces = _merged(_spans(first, last)), []
    filled: list[torch.Tensor] = []
    for span in spans:
        start, size = PIECE_ROUNDING * len(filled), span.end - span.start
        # The last query stands in for those that are missing: nobody looks at what it gets there.
        rows = torch.arange(span.start, span.start + _rounded(size, PIECE_ROUNDING)).clamp(max=span.end - 1)
        filled += rows.split(PIECE_ROUNDING)
        pieces.append(_piece(slice(start, start + len(rows)), span, first[rows], last[rows], num_keys, device))
    source = torch.cat(filled)
    back = torch.empty_like(order)
    # ``source`` ascends: of the rows that stand for a query this finds the first.
    back[order] = torch.searchsorted(source, torch.arange(len(order)))
    return PieceBlock(send(order[source], device), send(back, device), tuple(pieces))


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def rounded_width(keys: int) -> int:
    """At most an eighth more: a long row has hundreds of pieces, each wider than the one before."""
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
        # Others would be filled up to it: behind 64k keys to four times as many.
        size = max(min(PIECE_QUERIES, PIECE_SCORES // (high - low)) // PIECE_ROUNDING, 1) * PIECE_ROUNDING
        for at in range(start, end, size):
            stop = min(at + size, end)
            yield _Span(at, stop, low, int(last[stop - 1]) + 1)


def _merged(spans: Iterator[_Span]) -> list[_Span]:
    """Neighbours in one piece wherever the scores that nobody asked for cost less than a piece."""
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
    """Of ``span``, whose queries, filled up, see the keys ``first`` to ``last``."""
    width = rounded_width(span.high - span.low)
    high = min(span.low + width, num_keys)
    low = max(high - width, 0)
    # Up to its first query a single document is seen whole.
    masked_from = int(last[0]) + 1 if bool((first == low).all()) else low
    mask = None
    if masked_from < high:
        keys = torch.arange(masked_from, high)
        seen = (keys >= first[:, None]) & (keys <= last[:, None])
        mask = send(torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")), device)
    return Piece(queries, slice(low, high), mask)
