"""Which step-0 keys the queries of an unroll see, in the form that the device's attention takes.

A query at flat position t of a document that starts at s sees the keys s … t.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from nemo_speculative.devices import send
from nemo_speculative.drafts.attention import Block, Piece, PieceBlock
from nemo_speculative.drafts.flex import flex_block

PIECE_QUERIES = 256
PIECE_SCORES = 1 << 19
"""Scores of one head that are alive at once: 256 queries over 2048 keys."""
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
    pieces = tuple(_with_mask(span, first, last, device) for span in _merged(_spans(first, last)))
    return PieceBlock(send(order, device), send(order.argsort(), device), pieces)


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
        size = max(min(PIECE_QUERIES, PIECE_SCORES // (high - low)), 1)
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


def _with_mask(span: _Span, first: torch.Tensor, last: torch.Tensor, device: torch.device) -> Piece:
    queries = slice(span.start, span.end)
    starts, ends = first[queries], last[queries]
    # Up to its first query a single document is seen whole.
    masked_from = int(ends[0]) + 1 if bool((starts == span.low).all()) else span.low
    mask = None
    if masked_from < span.high:
        keys = torch.arange(masked_from, span.high)
        seen = (keys >= starts[:, None]) & (keys <= ends[:, None])
        mask = send(torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")), device)
    return Piece(queries, slice(span.low, span.high), mask)
