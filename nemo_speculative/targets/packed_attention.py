"""Causal attention of packed rows, document by document.

transformers keeps the documents of a row apart by a dense [B, 1, L, L] mask: quadratic memory, and work on scores that
are thrown away. Here documents of about one length lie side by side, padded at their ends, and each such group is one
causal call of torch's ``scaled_dot_product_attention``: causality hides the padding, so no mask is needed. Where a
layer has a sliding window of w, a longer document is cut into pieces of w queries, each with the w - 1 keys before it;
one mask [w, 2w - 1] serves them all. Memory grows with the tokens.

What transformers hands from its mask function to every layer is a :class:`DocumentMask`, as flex attention's is a
BlockMask. It carries the window that transformers gives this kind of layer: some layers do not say it again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from nemo_speculative.devices import send

BY_DOCUMENT = "by_document"
"""The name under which transformers knows this attention."""
SHORTEST_SHARE = 0.75
"""Documents share a call down to this share of the longest: more calls cost their start, fewer cost padding."""

_lengths: ContextVar[tuple[int, ...]] = ContextVar("document lengths")


@contextmanager
def packed_documents(lengths: Sequence[int]) -> Iterator[None]:
    """While it is open, the rows of a model with this attention hold documents of these lengths, row after row."""
    token = _lengths.set(tuple(lengths))
    try:
        yield
    finally:
        _lengths.reset(token)


@dataclass(frozen=True)
class _Piece:
    """Queries ``start`` to ``end`` of a document, which see its keys from ``first``; counted over all rows."""

    first: int
    start: int
    end: int

    @property
    def before(self) -> int:
        return self.start - self.first

    @property
    def queries(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class _Call:
    """One call of torch's attention."""

    pieces: int
    queries: int
    """Of each piece, padding included."""
    keys: int
    mask: torch.Tensor | None
    """bool [queries, keys]; None: causal."""


@dataclass(frozen=True)
class _Plan:
    """Which of the B * L tokens each call reads, one call after the other: Q queries and K keys."""

    queries: torch.Tensor
    """int64 [Q]"""
    keys: torch.Tensor
    """int64 [K]"""
    results: torch.Tensor
    """int64 [B * L]: which of the Q results is a token's."""
    calls: tuple[_Call, ...]


class DocumentMask:
    """What the tokens of packed rows see: their own document up to themselves, or the last ``window`` of that."""

    def __init__(self, lengths: Sequence[int], window: int | None):
        """``lengths``: tokens of every document, padding's included, row after row."""
        self._groups = _grouped(list(_pieces(lengths, window)))
        self._window = window
        self._plans: dict[torch.device, _Plan] = {}

    def plan(self, device: torch.device) -> _Plan:
        """Made once for each device that holds layers."""
        if device not in self._plans:
            self._plans[device] = _planned(self._groups, self._window, device)
        return self._plans[device]


def _pieces(lengths: Sequence[int], window: int | None) -> Iterator[_Piece]:
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        step = min(length, window or length)
        for start in range(end - length, end, step):
            yield _Piece(max(end - length, start - step + 1), start, min(start + step, end))


def _grouped(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Pieces that share a call, the longest first: as many keys before their queries, and about as many queries."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda p: (p.before, p.queries), reverse=True):
        if not groups or not _fits(piece, groups[-1][0]):
            groups.append([])
        groups[-1].append(piece)
    return groups


def _fits(piece: _Piece, longest: _Piece) -> bool:
    return piece.before == longest.before and piece.queries >= SHORTEST_SHARE * longest.queries


def _planned(groups: list[list[_Piece]], window: int | None, device: torch.device) -> _Plan:
    placed = [_places(group) for group in groups]
    queries, keys, real = (torch.cat(part) for part in zip(*placed, strict=True))
    kept = real.nonzero()[:, 0]
    results = torch.empty_like(kept)
    results[queries[kept]] = kept
    queries, keys, results = (send(x, device) for x in (queries, keys, results))
    return _Plan(queries, keys, results, tuple(_call(group, window, device) for group in groups))


def _places(group: list[_Piece]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one call, int64 [Q'] and [K'], and bool [Q'], which queries are not padding.

    Padding repeats the last token of its own piece, so that not even a NaN passes from one document to another.
    """
    first, start, last = torch.tensor([(p.first, p.start, p.end - 1) for p in group]).T[..., None]
    queries = start + torch.arange(group[0].queries)
    keys = first + torch.arange(group[0].before + group[0].queries)
    return queries.minimum(last).flatten(), keys.minimum(last).flatten(), (queries <= last).flatten()


def _call(group: list[_Piece], window: int | None, device: torch.device) -> _Call:
    queries, before = group[0].queries, group[0].before
    mask = None
    if window and before:
        own = before + torch.arange(queries, device=device)[:, None]
        key = torch.arange(before + queries, device=device)
        mask = (key <= own) & (key > own - window)
    return _Call(len(group), queries, before + queries, mask)


def document_mask(*, config: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> DocumentMask:
    """What transformers calls for the mask of each kind of layer.

    Raises:
        NotImplementedError: the layers see something else than their document, or a window of it.
    """
    if use_vmap or (local_size is not None and local_size != getattr(config, "sliding_window", None)):
        raise NotImplementedError("attention by document knows causality and sliding windows alone")
    return DocumentMask(_lengths.get(), local_size)


def attention_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DocumentMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for the attention of a layer.

    Args:
        query: [B, H, L, d].
        key, value: [B, H_kv, L, d] and [B, H_kv, L, d_v].
        scaling: of the scores; None: d ** -0.5.

    Returns:
        [B, L, H, d_v], and no weights.

    Raises:
        NotImplementedError: the layer asks for what torch's attention has not, or its model made a mask of its own.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if asked or dropout or not isinstance(attention_mask, DocumentMask):
        raise NotImplementedError(f"attention by document with {asked or dropout or type(attention_mask).__name__}")
    plan = attention_mask.plan(query.device)
    per_query = [call.pieces * call.queries for call in plan.calls]
    per_key = [call.pieces * call.keys for call in plan.calls]
    parts = zip(
        plan.calls,
        _gathered(query, plan.queries).split(per_query),
        _gathered(key, plan.keys).split(per_key),
        _gathered(value, plan.keys).split(per_key),
        strict=True,
    )
    out = torch.cat([_attend(call, q, k, v, scaling) for call, q, k, v in parts])
    return out.index_select(0, plan.results).unflatten(0, (query.shape[0], query.shape[2])), None


def _gathered(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[B, H, L, d] → [M, H, d]"""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, at)


def _attend(
    call: _Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[pieces * queries, H, d], [pieces * keys, H_kv, d] and [pieces * keys, H_kv, d_v] → [pieces * queries, H, d_v]"""
    q, k, v = (x.unflatten(0, (call.pieces, -1)).transpose(1, 2) for x in (query, key, value))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        # Not every kernel takes fewer heads of keys, and torch then falls to the one that makes the scores whole.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BY_DOCUMENT, attention_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, document_mask)
