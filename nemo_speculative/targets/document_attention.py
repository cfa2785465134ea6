"""Causal attention of packed rows, document by document.

transformers separates the documents of a row by a dense [B, 1, L, L] mask: quadratic memory, and scores that are
computed only to be masked.  Here documents of similar length are padded to one length and batched in one causal call of
torch's ``scaled_dot_product_attention``; causality hides the padding, so no mask is needed.  For layers with a sliding
window w, longer documents are cut into pieces of w queries, each with the w - 1 keys before it; all of them share one
mask [w, 2w - 1].  Memory grows linearly with the tokens.

With context parallelism the queries are this rank's shard, and keys and values are gathered.  A document's part in the
shard is then cut into pieces with all the keys before them, small enough for one mask each.

What transformers passes from its mask function to every layer is a :class:`DocumentMask`, as it passes a BlockMask for
flex attention.  It carries the window of its kind of layer, since some layers do not pass it to the attention again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import to_device

BY_DOCUMENT = "by_document"
"""Name of this attention in transformers' registry."""
MIN_LENGTH_RATIO = 0.75
"""Shortest document of a call relative to its longest: more calls cost launches, fewer cost padding."""
MAX_MASK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Largest mask of a piece that attends to keys before it, by device type."""

_packed: ContextVar[tuple[tuple[int, ...], ContextShard]] = ContextVar("document lengths and context shard")


@contextmanager
def packed_documents(lengths: Sequence[int], shard: ContextShard = FULL_BATCH) -> Iterator[None]:
    """Sets the documents for forward passes, see :class:`DocumentMask`; the model reads the tokens of ``shard``."""
    token = _packed.set((tuple(lengths), shard))
    try:
        yield
    finally:
        _packed.reset(token)


class _Piece(NamedTuple):
    """Queries of a document, with the keys that they attend to."""

    keys_before: int
    queries: int
    start: int
    """Flat position of the first query."""
    offset: int
    """Position of the first query within the shard."""


class _Call(NamedTuple):
    """One batched call of torch's attention, for pieces of equally many queries and keys, including padding."""

    pieces: int
    queries: int
    keys: int
    key_positions: slice | torch.Tensor
    """Flat positions of the keys, int64 [pieces * keys]; for a single piece a slice, which copies nothing."""
    window_mask: torch.Tensor | None
    """bool [queries, keys] for layers with a sliding window."""

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """bool [queries, keys]; None: causal."""
        before = self.keys - self.queries
        if self.window_mask is not None or not before:
            return self.window_mask
        # Made per call: the masks of all calls together would be as large as all scores.
        return torch.ones(self.queries, self.keys, dtype=torch.bool, device=device).tril_(before)


class _Plan(NamedTuple):
    """Assignment of the shard's m tokens to the Q queries (with padding) of the calls, which follow each other."""

    queries: torch.Tensor
    """int64 [Q]: token of each query."""
    results: torch.Tensor
    """int64 [m]: query whose result is the token's."""
    calls: list[_Call]


class DocumentMask:
    """Packed documents, each token of which attends to its own document up to itself, or the last ``window`` of that.

    ``lengths``: tokens of every document, row after row, with padding's; ``shard``: the tokens that are computed.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, shard: ContextShard = FULL_BATCH):
        self.shard = shard
        self._lengths, self._window = lengths, window
        self._plans: dict[torch.device, _Plan] = {}

    def plan(self, device: torch.device) -> _Plan:
        """The plan, made once for each device that holds layers."""
        if device not in self._plans:
            groups = _group_by_length(self._pieces(MAX_MASK_ELEMENTS[device.type]))
            padded = [_pad([(p.offset, p.queries) for p in group], group[0].queries) for group in groups]
            queries, is_real = (torch.cat(part) for part in zip(*padded, strict=True))
            real = is_real.nonzero()[:, 0]
            results = torch.empty_like(real)
            results[queries[real]] = real
            calls = [_make_call(group, self._window, device) for group in groups]
            self._plans[device] = _Plan(to_device(queries, device), to_device(results, device), calls)
        return self._plans[device]

    def _pieces(self, max_mask_elements: int) -> list[_Piece]:
        """The shard's part of each document, cut into pieces of one window, or of the largest mask."""
        pieces, offset, window = [], 0, self._window
        for run in self.shard.ranges(sum(self._lengths)):
            for length, end in zip(self._lengths, accumulate(self._lengths), strict=True):
                document, part = end - length, range(max(end - length, run.start), min(end, run.stop))
                if not part:
                    continue
                step = window or len(part)
                if not window and part.start > document:
                    step = max(max_mask_elements // (part.stop - document), 1)
                for start in range(part.start, part.stop, step):
                    before = min(start - document, window - 1) if window else start - document
                    queries = min(step, part.stop - start)
                    pieces.append(_Piece(before, queries, start, offset + start - part.start))
                offset += len(part)
        return pieces


def _group_by_length(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Pieces that share a call, the longest first: equally many keys before, and similarly many queries."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda p: (p.keys_before, p.queries), reverse=True):
        longest = groups[-1][0] if groups else piece
        similar = piece.queries >= MIN_LENGTH_RATIO * longest.queries
        if not groups or piece.keys_before != longest.keys_before or not similar:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _make_call(group: list[_Piece], window: int | None, device: torch.device) -> _Call:
    before, queries, start, _ = group[0]
    mask = None
    if window and before:
        own = before + torch.arange(queries, device=device)[:, None]
        key = torch.arange(before + queries, device=device)
        mask = (key <= own) & (key > own - window)
    if len(group) == 1:
        return _Call(1, queries, before + queries, slice(start - before, start + queries), mask)
    keys, _ = _pad([(p.start - before, before + p.queries) for p in group], before + queries)
    return _Call(len(group), queries, before + queries, to_device(keys, device), mask)


def _pad(runs: list[tuple[int, int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of runs (start, length), each padded to ``length``: int64 [runs * length]; bool, which are not padding.

    Padding repeats the last token of its own run, so that not even a NaN passes from one document to another.
    """
    start, count = torch.tensor(runs).T[..., None]
    positions, last = start + torch.arange(length), start + count - 1
    return positions.minimum(last).flatten(), (positions <= last).flatten()


def document_mask(*, config: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> DocumentMask:
    """Mask function that transformers calls for each kind of layer; raises NotImplementedError for other masks."""
    if use_vmap or (local_size is not None and local_size != getattr(config, "sliding_window", None)):
        raise NotImplementedError("attention by document knows causality and sliding windows alone")
    lengths, shard = _packed.get()
    return DocumentMask(lengths, local_size, shard)


def attention_by_document(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: DocumentMask,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention function that transformers calls in each layer.

    Args:
        query: [B, H, L, d], for a context shard [1, H, m, d].
        key, value: [B, H_kv, L, d] and [B, H_kv, L, d_v], for a context shard likewise.
        scaling: factor of the scores; None: d ** -0.5.

    Returns:
        [B, L, H, d_v], and no weights.

    Raises:
        NotImplementedError: the layer needs an option that torch's attention lacks, or its model made its own mask.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unsupported or dropout or not isinstance(attention_mask, DocumentMask):
        option = unsupported or dropout or type(attention_mask).__name__
        raise NotImplementedError(f"attention by document with {option}")
    plan = attention_mask.plan(query.device)
    keys, values = attention_mask.shard.all_gather(_by_token(key), _by_token(value))
    queries = _by_token(query).index_select(0, plan.queries).split([call.pieces * call.queries for call in plan.calls])
    out = torch.cat([_attend(call, q, keys, values, scaling) for call, q in zip(plan.calls, queries, strict=True)])
    return out.index_select(0, plan.results).unflatten(0, (query.shape[0], query.shape[2])), None


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, d] → [B * L, H, d]"""
    return x.transpose(1, 2).flatten(0, 1)


def _attend(
    call: _Call, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[pieces * queries, H, d], all keys [N, H_kv, d] and values [N, H_kv, d_v] → [pieces * queries, H, d_v]"""
    at = call.key_positions
    key, value = (x[at] if isinstance(at, slice) else x.index_select(0, at) for x in (keys, values))
    q, k, v = (x.unflatten(0, (call.pieces, -1)).transpose(1, 2) for x in (query, key, value))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        # Not every kernel takes fewer key-value heads; torch would fall back to the one that stores all scores.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mask = call.mask(query.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BY_DOCUMENT, attention_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, document_mask)
