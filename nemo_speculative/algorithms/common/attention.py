"""Attention of the training-time test.

At step i the query of slot t sees the step-0 keys of its own document up to t, and the keys of steps 1 … i at its own
slot only (EAGLE-3, training-time test): a causal block, the same at every step, plus a diagonal.  Each part is computed
by itself, and the two are joined by the logarithms of their normalizers.  What a query sees of the block is a range of
keys, s … t in a document that starts at s, so no mask is ever quadratic.  On a CPU the block is a few matrix products,
on CUDA torch's flex attention: one kernel over block-sparse queries and keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nemo_speculative.utils.devices import to_device

PIECE_QUERIES = 128
PIECE_SCORES = 1 << 19
"""Scores of one head in memory at once: 128 queries over 4096 keys; more only for PIECE_ROUNDING queries."""
PIECE_ROUNDING = 32
"""Queries and keys of a piece are rounded up to a multiple: oneDNN builds and keeps a primitive for every shape."""
PIECE_COST = 1 << 13
"""The fixed cost of a piece, in scores: the dispatch of some twenty small operations."""
FLEX_BLOCK = 128
"""Queries and keys of a block of flex attention's block mask."""
WIDE_GAP = 64
"""Distance of two queries from which on they are cheaper in two pieces."""

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Neighboring queries and the range of keys that covers what they see."""

    queries: slice
    """The piece's queries, as a slice of ``order``."""
    keys: slice
    mask: torch.Tensor | None
    """float32 [queries, w], 0 or -inf, over the last w keys; all of the queries see the other keys."""


@dataclass(frozen=True)
class CausalBlock:
    """The causal block of a step: which step-0 keys each query sees.

    On a CPU it is a few matrix products, each over queries that see about the same keys.  They run in oneDNN, which
    those of torch's flash kernel do not, and the queries need not be contiguous (``python -m benchmarks.attention``
    compares both).
    """

    order: torch.Tensor
    """int64 [m], m >= n: the queries in ascending order of position, in pieces some of them more than once."""
    inverse: torch.Tensor
    """int64 [n]: the place of each query in ``order``."""
    layout: Sequence[Piece] | BlockMask
    """The pieces, or the mask of flex attention."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """[n, H, d] over [H_kv, m, d] → [n, H, d], and log Σ exp(scores), float32 [n, H]; both have gradients."""
        attention: Any = _flex_attention if isinstance(self.layout, BlockMask) else _PieceAttention.apply
        out, lse = attention(q.index_select(0, self.order), keys, values, self.layout)
        return out.index_select(0, self.inverse), lse.index_select(0, self.inverse)


def unroll_attention(q: torch.Tensor, step0: Pair, block: CausalBlock, own: Sequence[Pair]) -> torch.Tensor:
    """One softmax over the visible step-0 keys and a slot's own later keys.

    Queries [n, H, d], keys and values [H_kv, m, d] of step 0, and [n, H_kv, d] of each of steps 1 … i → [n, H, d].
    """
    out, lse = block.attend(q, *step0)
    if not own:
        return out
    kv_heads, dim = own[0][0].shape[1:]
    groups = q.unflatten(1, (kv_heads, -1))
    scores = [(groups * k[:, :, None]).sum(-1).to(lse.dtype) * dim**-0.5 for k, _ in own]
    weights = torch.stack([lse.unflatten(1, (kv_heads, -1)), *scores]).softmax(0).to(out.dtype)[..., None]
    joined = weights[0] * out.unflatten(1, (kv_heads, -1))
    for weight, (_, v) in zip(weights[1:], own, strict=True):
        joined = torch.addcmul(joined, weight, v[:, :, None])
    return joined.flatten(1, 2)


class _PieceAttention(torch.autograd.Function):
    """Recomputes scores in the backward pass: P = exp(s - lse), dS = P ∘ (dO V^T - rowsum(dO ∘ O) + d lse)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pieces: Sequence[Piece]) -> Pair:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for piece in pieces:
            scores = _scores(_by_head(q[piece.queries], keys), keys, piece)
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            attended = torch.bmm(weights.to(values.dtype), values[:, piece.keys]).div_(total)
            out[piece.queries] = _by_query(attended, piece)
            lse[piece.queries] = _by_query(top + total.log(), piece)[..., 0]
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.pieces = pieces
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_out, grad_lse = gradients
        q, keys, values, out, lse = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (keys, values))
        # The share of a row's scores in its normalizer.
        shift = grad_lse - (grad_out * out).sum(-1, dtype=lse.dtype)
        for piece in ctx.pieces:
            at = piece.queries
            q_piece, g_piece = _by_head(q[at], keys), _by_head(grad_out[at], keys)
            k_piece, v_piece = keys[:, piece.keys], values[:, piece.keys]
            weights = _scores(q_piece, keys, piece).sub_(_by_head(lse[at][..., None], keys)).exp_()
            _add_product_(grad_v[:, piece.keys], weights.to(values.dtype).transpose(1, 2), g_piece)
            grad_s = torch.bmm(g_piece, v_piece.transpose(1, 2)).to(lse.dtype)
            grad_s = grad_s.add_(_by_head(shift[at][..., None], keys)).mul_(weights).to(q.dtype)
            grad_q[at] = _by_query(torch.bmm(grad_s, k_piece), piece)
            _add_product_(grad_k[:, piece.keys], grad_s.transpose(1, 2), q_piece)
        scale = q.shape[-1] ** -0.5
        return grad_q.mul_(scale), grad_k.mul_(scale).to(keys.dtype), grad_v.to(values.dtype), None


def _scores(q: torch.Tensor, keys: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[H_kv, G * n, d] over the piece's keys: [H_kv, G * n, k], masked, at least float32."""
    scores = torch.bmm(q * q.shape[-1] ** -0.5, keys[:, piece.keys].transpose(1, 2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if piece.mask is not None:
        rows, width = piece.mask.shape
        scores.unflatten(1, (-1, rows))[..., -width:].add_(piece.mask)
    return scores


def _by_head(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[n, H, w] → [H_kv, G * n, w]: the queries that share a head of the keys, concatenated."""
    return x.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_query(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[H_kv, G * n, w] → [n, H, w]."""
    return x.unflatten(1, (-1, piece.queries.stop - piece.queries.start)).permute(2, 0, 1, 3).flatten(1, 2)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` [B, n, m], where ``total`` is at least float32: in bfloat16 small terms would vanish."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)


def block_for(positions: torch.Tensor, index: torch.Tensor, device: torch.device) -> CausalBlock:
    """The keys that the queries at flat positions ``index`` see, for attention on ``device``.

    Args:
        positions: int64 [m], on the host: the position of every key in its document.
        index: int64 [n], on the host, in any order.
    """
    # The queries in ascending order, and the range of keys that each sees.
    order = index.argsort(stable=True)
    last = index[order]
    first = last - positions[last]
    if device.type == "cuda":
        return flex_block(order, first, last, len(positions), device)
    spans, pieces = _merged(_spans(first, last)), []
    padded: list[torch.Tensor] = []
    for span in spans:
        start = PIECE_ROUNDING * len(padded)
        # Padded with copies of the last query, whose outputs are not read.
        rows = torch.arange(span.start, span.start + round_up(span.end - span.start, PIECE_ROUNDING))
        rows = rows.clamp(max=span.end - 1)
        padded += rows.split(PIECE_ROUNDING)
        pieces.append(_piece(slice(start, start + len(rows)), span, first[rows], last[rows], len(positions), device))
    source = torch.cat(padded)
    inverse = torch.empty_like(order)
    # ``source`` ascends: of the copies of a query this finds the first.
    inverse[order] = torch.searchsorted(source, torch.arange(len(order)))
    return CausalBlock(to_device(order[source], device), to_device(inverse, device), pieces)


def round_up(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple of ``multiple``."""
    return -(-count // multiple) * multiple


def rounded_width(keys: int) -> int:
    """``keys`` rounded up, by at most an eighth: a long row has hundreds of pieces, each wider than the one before."""
    return round_up(keys, max(PIECE_ROUNDING, 1 << max(keys.bit_length() - 4, 0)))


class _Span(NamedTuple):
    """Queries ``start`` to ``end`` (in ascending order) over keys ``low`` to ``high``."""

    start: int
    end: int
    low: int
    high: int

    @property
    def scores(self) -> int:
        return (self.end - self.start) * (self.high - self.low)


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
    out = [next(spans)]
    for span in spans:
        before = out[-1]
        both = _Span(before.start, span.end, min(before.low, span.low), max(before.high, span.high))
        fits = both.end - both.start <= PIECE_QUERIES and both.scores <= PIECE_SCORES
        if fits and both.scores <= before.scores + span.scores + PIECE_COST:
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


def _flex_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: BlockMask) -> Pair:
    attention = _compiled() if q.is_cuda else flex_attention
    out, aux = attention(
        q.transpose(0, 1)[None], keys[None], values[None], block_mask=mask, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1).float()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_block(
    order: torch.Tensor, first: torch.Tensor, last: torch.Tensor, num_keys: int, device: torch.device
) -> CausalBlock:
    """The block of queries that see the keys ``first`` to ``last``, int64 [n] each, on the host, ascending."""
    rows, cols = (-(-n // FLEX_BLOCK) for n in (len(first), num_keys))
    spare = rows * FLEX_BLOCK - len(first)
    starts, ends = (torch.cat((x, x[-1:].expand(spare))).view(rows, FLEX_BLOCK) for x in (first, last))
    low = torch.arange(cols) * FLEX_BLOCK
    high = low + FLEX_BLOCK - 1
    # bool [query blocks, key blocks]: at least partly visible, and fully visible.
    some = (low <= ends.amax(1)[:, None]) & (high >= starts.amin(1)[:, None])
    full = (low >= starts.amax(1)[:, None]) & (high <= ends.amin(1)[:, None])
    first, last = to_device(first, device), to_device(last, device)

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[query]) & (key <= last[query])

    counts, blocks, full_counts, full_blocks = (
        to_device(x, device) for x in (*_indices(some & ~full), *_indices(full))
    )
    mask = BlockMask.from_kv_blocks(
        counts, blocks, full_counts, full_blocks, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees,
        seq_lengths=(len(first), num_keys),
    )  # fmt: skip
    return CausalBlock(to_device(order, device), to_device(order.argsort(), device), mask)


def _indices(blocks: torch.Tensor) -> Pair:
    """The number of key blocks of each query block, and which: int32 [1, 1, rows] and [1, 1, rows, cols]."""
    order = (~blocks).to(torch.uint8).sort(dim=1, stable=True).indices
    return blocks.sum(1).int()[None, None], order.int()[None, None]
