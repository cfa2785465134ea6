"""Attention of the training-time test.

At step i the query of slot t sees the step-0 keys of its own document up to t, and the keys of steps 1 … i at its own
slot only (EAGLE-3, training-time test): a causal block, the same at every step, plus a diagonal.  Each part is computed
by itself, and the two are joined by the logarithms of their normalizers.  What a query sees of the block is a range of
keys, so no mask is ever quadratic.  :mod:`.blocks` makes the blocks from positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class CausalBlock(Protocol):
    """The causal block of a step: which step-0 keys each query sees."""

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """[n, H, d] over [H_kv, m, d] → [n, H, d], and log Σ exp(scores), float32 [n, H]; both have gradients."""
        ...


def unroll_attention(q: torch.Tensor, step0: Pair, block: CausalBlock, own: Sequence[Pair]) -> torch.Tensor:
    """One softmax over the visible step-0 keys and a slot's own later keys.

    Args:
        q: [n, H, d], the slots' queries.
        step0: keys and values [H_kv, m, d] of step 0, all positions.
        own: keys and values [n, H_kv, d] of steps 1 … i.

    Returns:
        [n, H, d]
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


@dataclass(frozen=True)
class Piece:
    """Neighboring queries and the range of keys that covers what they see."""

    queries: slice
    """Of the queries in ``order``."""
    keys: slice
    mask: torch.Tensor | None
    """float32 [queries, w], 0 or -inf, over the last w keys; all of the queries see the other keys."""


@dataclass(frozen=True)
class PieceBlock:
    """The causal block as a few matrix products, each over queries that see about the same keys.

    On a CPU its products run in oneDNN, which those of torch's flash kernel do not, and its queries need not be
    contiguous (``python -m benchmarks.attention`` compares both).
    """

    order: torch.Tensor
    """int64 [m], m >= n: the queries in ascending order of position, some of them more than once."""
    inverse: torch.Tensor
    """int64 [n]: the place of each query in ``order``."""
    pieces: tuple[Piece, ...]

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        out, lse = _PieceAttention.apply(q.index_select(0, self.order), keys, values, self.pieces)
        return out.index_select(0, self.inverse), lse.index_select(0, self.inverse)


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
            queries = piece.queries.stop - piece.queries.start
            out[piece.queries] = _by_query(attended, queries)
            lse[piece.queries] = _by_query(top + total.log(), queries)[..., 0]
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
            grad_q[at] = _by_query(torch.bmm(grad_s, k_piece), at.stop - at.start)
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


def _by_query(x: torch.Tensor, queries: int) -> torch.Tensor:
    """[H_kv, G * n, w] → [n, H, w]."""
    return x.unflatten(1, (-1, queries)).permute(2, 0, 1, 3).flatten(1, 2)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` [B, n, m], where ``total`` is at least float32: in bfloat16 small terms would vanish."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)
