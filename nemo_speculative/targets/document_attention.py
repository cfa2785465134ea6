"""Causal attention of packed rows, document by document.

transformers keeps the documents of a row apart by a dense [B, 1, L, L] mask: quadratic memory, and work on scores that
are thrown away. Here documents of about one length lie side by side, padded at their ends, and each such group is one
causal call of torch's ``scaled_dot_product_attention``: causality hides the padding, so no mask is needed. Where a
layer has a sliding window of w, a longer document is cut into pieces of w queries, each with the w - 1 keys before it;
one mask [w, 2w - 1] serves them all. Memory grows with the tokens.

Where ranks share the tokens of the rows, queries are those of this rank's share, and keys and values are gathered. A
part of a document is then cut into pieces with all the keys before them, small enough for a mask of each.

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

from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import send

BY_DOCUMENT = "by_document"
"""The name under which transformers knows this attention."""
SHORTEST_SHARE = 0.75
"""Documents share a call down to this share of the longest: more calls cost their start, fewer cost padding."""
MASKED_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores of a head, at most, of a piece with all the keys before it: its mask is made whole."""

_packed: ContextVar[tuple[tuple[int, ...], ContextShard]] = ContextVar(
    "document lengths, and who computes what of them"
)


@contextmanager
def packed_documents(lengths: Sequence[int], shard: ContextShard = FULL_BATCH) -> Iterator[None]:
    """While it is open, the rows of a model with this attention hold documents of these lengths, row after row.

    The model is given ``shard`` of them.
    """
    token = _packed.set((tuple(lengths), shard))
    try:
        yield
    finally:
        _packed.reset(token)


@dataclass(frozen=True)
class _Piece:
    """Queries ``start`` to ``end`` of a document, which see its keys from ``first``; counted over all rows."""

    first: int
    start: int
    end: int
    at: int
    """Where in the share its queries are."""

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
    """Of each piece, likewise."""
    at: slice | torch.Tensor
    """Where these are among those of all B * L tokens, int64 [pieces * keys]; of one piece a slice: no copy."""
    window: torch.Tensor | None
    """bool [queries, keys]: what is seen within a window; None: all before."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Its own of the keys or values [B * L, H_kv, d] of all tokens."""
        return x[self.at] if isinstance(self.at, slice) else x.index_select(0, self.at)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """bool [queries, keys]; None: causal."""
        before = self.keys - self.queries
        if self.window is not None or not before:
            return self.window
        # Of one call only: of all of them it would be as large as the scores of all tokens.
        return torch.ones(self.queries, self.keys, dtype=torch.bool, device=device).tril_(before)


@dataclass(frozen=True)
class _Plan:
    """Which of the m tokens of the share are the Q queries of the calls, one call after the other."""

    queries: torch.Tensor
    """int64 [Q]"""
    results: torch.Tensor
    """int64 [m]: which of the Q results is a token's."""
    calls: tuple[_Call, ...]


class DocumentMask:
    """What the tokens of packed rows see: their own document up to themselves, or the last ``window`` of that."""

    def __init__(self, lengths: Sequence[int], window: int | None, shard: ContextShard = FULL_BATCH):
        """``lengths``: tokens of every document, padding's included, row after row."""
        self.shard = shard
        self._lengths, self._window = lengths, window
        self._plans: dict[torch.device, _Plan] = {}

    def plan(self, device: torch.device) -> _Plan:
        """Made once for each device that holds layers."""
        if device not in self._plans:
            parts = _parts(self._lengths, self.shard)
            pieces = _pieces(parts, self._window, MASKED_SCORES[device.type])
            self._plans[device] = _planned(_grouped(list(pieces)), self._window, device)
        return self._plans[device]


def _parts(lengths: Sequence[int], shard: ContextShard) -> Iterator[_Piece]:
    """What the share has of each document, behind all of the document's keys before it."""
    at = 0
    for run in shard.ranges(sum(lengths)):
        for length, end in zip(lengths, accumulate(lengths), strict=True):
            part = range(max(end - length, run.start), min(end, run.stop))
            if part:
                yield _Piece(end - length, part.start, part.stop, at)
                at += len(part)


def _pieces(parts: Iterator[_Piece], window: int | None, most: int) -> Iterator[_Piece]:
    """``parts`` cut where a window or ``most`` scores of a mask ask for it."""
    for part in parts:
        step = part.queries
        if window:
            step = min(step, window)
        elif part.before:
            step = min(step, max(most // (part.end - part.first), 1))
        for start in range(part.start, part.end, step):
            first = max(part.first, start - window + 1) if window else part.first
            yield _Piece(first, start, min(start + step, part.end), part.at + start - part.start)


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
    queries, real = (torch.cat(part) for part in zip(*map(_queries, groups), strict=True))
    kept = real.nonzero()[:, 0]
    results = torch.empty_like(kept)
    results[queries[kept]] = kept
    return _Plan(send(queries, device), send(results, device), tuple(_call(group, window, device) for group in groups))


def _queries(group: list[_Piece]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one call, int64 [Q'], and bool [Q'], which are not padding.

    Padding repeats the last token of its own piece, so that not even a NaN passes from one document to another.
    """
    at, last = torch.tensor([(p.at, p.at + p.queries - 1) for p in group]).T[..., None]
    queries = at + torch.arange(group[0].queries)
    return queries.minimum(last).flatten(), (queries <= last).flatten()


def _keys(group: list[_Piece]) -> torch.Tensor:
    """Of one call, int64 [K']; padded likewise."""
    first, last = torch.tensor([(p.first, p.end - 1) for p in group]).T[..., None]
    return (first + torch.arange(group[0].before + group[0].queries)).minimum(last).flatten()


def _call(group: list[_Piece], window: int | None, device: torch.device) -> _Call:
    queries, before = group[0].queries, group[0].before
    mask = None
    if window and before:
        own = before + torch.arange(queries, device=device)[:, None]
        key = torch.arange(before + queries, device=device)
        mask = (key <= own) & (key > own - window)
    at = slice(group[0].first, group[0].end) if len(group) == 1 else send(_keys(group), device)
    return _Call(len(group), queries, before + queries, at, mask)


def document_mask(*, config: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> DocumentMask:
    """What transformers calls for the mask of each kind of layer.

    Raises:
        NotImplementedError: the layers see something else than their document, or a window of it.
    """
    if use_vmap or (local_size is not None and local_size != getattr(config, "sliding_window", None)):
        raise NotImplementedError("attention by document knows causality and sliding windows alone")
    lengths, shard = _packed.get()
    return DocumentMask(lengths, local_size, shard)


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
        query: [B, H, L, d], of a share [1, H, m, d].
        key, value: [B, H_kv, L, d] and [B, H_kv, L, d_v], of a share likewise.
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
    keys, values = attention_mask.shard.all_gather(_by_token(key), _by_token(value))
    queries = _by_token(query).index_select(0, plan.queries).split([call.pieces * call.queries for call in plan.calls])
    parts = zip(plan.calls, queries, strict=True)
    out = torch.cat([_attend(call, q, call.of(keys), call.of(values), scaling) for call, q in parts])
    return out.index_select(0, plan.results).unflatten(0, (query.shape[0], query.shape[2])), None


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, d] → [B * L, H, d]"""
    return x.transpose(1, 2).flatten(0, 1)


def _attend(
    call: _Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[pieces * queries, H, d], [pieces * keys, H_kv, d] and [pieces * keys, H_kv, d_v] → [pieces * queries, H, d_v]"""
    q, k, v = (x.unflatten(0, (call.pieces, -1)).transpose(1, 2) for x in (query, key, value))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        # Not every kernel takes fewer heads of keys, and torch then falls to the one that makes the scores whole.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mask = call.mask(query.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BY_DOCUMENT, attention_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, document_mask)
