"""Autoregressive drafting: a draft over its KV cache reads the target's features once, then its own outputs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from nemo_speculative.algorithms.common.attention import Pair
from nemo_speculative.algorithms.common.draft import Draft

FIRST_CAPACITY = 64


class KVCache:
    """Keys and values of a model's layers for B sequences of different lengths.

    Positions past a row's length are scratch: ``append`` writes there, ``advance`` or ``keep`` makes them count, the
    next ``append`` overwrites the others.
    """

    def __init__(self, batch_size: int = 1) -> None:
        self._layers: dict[int, list[torch.Tensor]] = {}
        self.set_lengths([0] * batch_size)

    def set_lengths(self, lengths: list[int]) -> None:
        """Makes the first ``lengths`` positions of each row count, and no others."""
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        self.ragged = min(lengths, default=0) < self.longest
        """Whether the rows differ in length; only then does causal attention need a mask."""
        self._positions: dict[tuple[int, torch.device], Pair] = {}

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Writes n positions after each row's length.

        Keys and values [B, H_kv, n, d] each → those of all m positions, with m = the longest row's length + n; a
        shorter row's last positions hold whatever was there.
        """
        new = key.shape[2]
        end = self.longest + new
        stored = self._layers.get(layer) or [x[:, :, :0] for x in (key, value)]
        if stored[0].shape[2] < end:
            capacity = max(FIRST_CAPACITY, 1 << (end - 1).bit_length())
            # Zeros: masked positions are still multiplied, and 0 * NaN is NaN.
            stored = self._layers[layer] = [_lengthened(x, capacity) for x in stored]
        for tensor, x in zip(stored, (key, value), strict=True):
            if self.ragged:
                rows, at = self._next_positions(new, key.device)
                tensor[rows, :, at] = x.transpose(1, 2)
            else:
                tensor.narrow(2, self.longest, new).copy_(x)
        return stored[0].narrow(2, 0, end), stored[1].narrow(2, 0, end)

    def visible(self, ancestors: torch.Tensor) -> torch.Tensor:
        """The positions, of the m that ``append`` will return, that the next n of each row see: bool [B or 1, n, m].

        Of the newest s positions of its row, the next n last, each sees ``ancestors`` bool [B or 1, n, s]; before
        them, all.
        """
        new, span = ancestors.shape[1:]
        if not self.ragged:
            return pad(ancestors, (self.longest + new - span, 0), value=True)
        starts = torch.tensor(self.lengths, device=ancestors.device)[:, None] + (new - span)
        offset = torch.arange(self.longest + new, device=ancestors.device) - starts
        place = offset.clamp(0, span - 1)[:, None].expand(-1, new, -1)
        within = ancestors.expand(len(self.lengths), -1, -1).gather(2, place) & (offset < span)[:, None]
        return (offset < 0)[:, None] | within

    def advance(self, counts: Sequence[int] | int) -> None:
        """The first ``counts`` scratch positions of each row count from now on."""
        many = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.set_lengths([length + n for length, n in zip(self.lengths, many, strict=True)])

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """The scratch positions ``paths`` of each row, ascending, move to its end and count."""
        counts = [len(path) for path in paths]
        if any(path[-1] >= n for path, n in zip(paths, counts, strict=True)):
            # A shorter path is padded with positions that stay where they are.
            whole = torch.tensor([[*path, *range(len(path), max(counts))] for path in paths])
            for stored in self._layers.values():
                rows, to = self._next_positions(max(counts), stored[0].device)
                source = to[:, :1] + whole.to(to.device)
                for tensor in stored:
                    tensor[rows, :, to] = tensor[rows, :, source]
        self.advance(counts)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the sequences ``rows``, in this order."""
        index = list(rows)
        self._layers = {layer: [tensor[index] for tensor in stored] for layer, stored in self._layers.items()}
        self.set_lengths([self.lengths[row] for row in index])

    def join(self, other: "KVCache") -> None:
        """Appends the sequences of ``other`` to those of this cache."""
        for layer, others in other._layers.items():
            stored = self._layers[layer]
            capacity = max(stored[0].shape[2], others[0].shape[2])
            both = zip(stored, others, strict=True)
            self._layers[layer] = [torch.cat((_lengthened(x, capacity), _lengthened(y, capacity))) for x, y in both]
        self.set_lengths(self.lengths + other.lengths)

    def _next_positions(self, new: int, device: torch.device) -> Pair:
        """Row [B, 1] and position [B, n] of the ``new`` positions after each row's length."""
        if (new, device) not in self._positions:
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            at = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(new, device=device)
            self._positions[new, device] = rows, at
        return self._positions[new, device]


def _lengthened(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """[B, H, m, d] with zeros appended up to ``capacity`` positions."""
    return pad(x, (0, 0, 0, capacity - x.shape[2]))


class RotaryTable:
    """Cosines and sines of a draft's positions: recomputing them would cost as much as the rest of a draft step."""

    def __init__(self, draft: Draft):
        weight = draft.decoder_layers[0].self_attn.q_proj.weight
        self.rotary, self.device, self.dtype = draft.rotary, weight.device, weight.dtype
        self._table = self._compute(512)

    def at(self, starts: Sequence[int], n: int) -> Pair:
        """cos and sin [B or 1, 1, n, d] of the n positions from ``starts[b]`` on."""
        end = max(starts) + n
        if end > self._table[0].shape[2]:
            self._table = self._compute(2 * end)
        cos, sin = self._table
        if min(starts) == max(starts):
            return cos[:, :, end - n : end], sin[:, :, end - n : end]
        index = torch.tensor(starts, device=self.device)[:, None] + torch.arange(n, device=self.device)
        return cos[0, 0, index][:, None], sin[0, 0, index][:, None]

    def _compute(self, length: int) -> Pair:
        return self.rotary(torch.arange(length, device=self.device)[None], self.dtype)  # type: ignore[no-any-return]


class DraftSession(ABC):
    """Drafting for one batch of sequences: a draft and its KV cache of them; one subclass per algorithm."""

    def __init__(self, draft: Any, batch_size: int = 1, table: RotaryTable | None = None):
        self.draft, self.cache, self.table = draft, KVCache(batch_size), table or RotaryTable(draft)
        self.ids = draft.draft_ids

    @abstractmethod
    def first_layer_input(self, embeddings: torch.Tensor, feature: torch.Tensor) -> Pair:
        """The input of the first layer's attention, [..., h] each → [..., width], and its residual [..., h]."""

    def extend(
        self, embeddings: torch.Tensor, feature: torch.Tensor, rotation: Pair, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last layer's outputs [B, n, h] at n new positions of each sequence; caches their keys and values.

        Args:
            embeddings, feature: [B, n, h], of the tokens after those positions, and of the positions.
            rotation: cos and sin [B or 1, 1, n, d] of those positions.
            visible: bool [B, n, m] over the m cached positions, the new ones last; None: causal.
        """
        new = embeddings.shape[1]
        if visible is None and (new > 1 or self.cache.ragged):
            visible = self.cache.visible(embeddings.new_ones(1, new, new, dtype=torch.bool).tril())
        mask = None if visible is None else visible[:, None]
        x, residual = self.first_layer_input(embeddings, feature)
        for n, layer in enumerate(self.draft.decoder_layers):
            if n:
                x = layer.norm_input(residual)
            q, k, v = layer.qkv(x, *rotation)
            keys, values = self.cache.append(n, k, v)
            grouped = q.shape[1] != keys.shape[1]
            attended = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)
            residual = layer.finish(residual, attended.transpose(1, 2).flatten(2))
        return residual


class DraftCursor:
    """A session's draft at the newest level of the trees that it proposes, w nodes wide; starts at the root.

    The levels are in the session's cache, after the sequences; the caller cuts them off again.

    Args:
        root: int64 [B, 1], the root's tokens.
        output: [B, 1, h], the last layer's, at the position before the root.
    """

    def __init__(self, session: DraftSession, root: torch.Tensor, output: torch.Tensor):
        self.session, self.root, self._output = session, root, output
        self.ids: torch.Tensor = session.ids
        """int64 [V_d], the target's ids of the draft vocabulary."""
        self._positions = list(session.cache.lengths)
        self._ancestors: torch.Tensor | None = None
        """bool [B or 1, w, s]: which of the s nodes so far each node sees; None: chains, or no nodes yet."""

    @property
    def logits(self) -> torch.Tensor:
        """[B, w, V_d], for the children of each node of the level."""
        return self.session.draft.compute_logits(self._output)  # type: ignore[no-any-return]

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """Runs the draft on the next level.

        Args:
            tokens: int64 [B, w'], the target's ids.
            parents: int64 [B or 1, w'], index of each one's parent in the previous level; None: it has one node.
        """
        draft, cache = self.session.draft, self.session.cache
        feature = draft.next_feature(self._output)
        visible = None
        if parents is not None:
            wide = parents.expand(len(tokens), -1)[..., None]
            feature = feature.gather(1, wide.expand(-1, -1, feature.shape[-1]))
            visible = cache.visible(self._extend_ancestors(parents))
        rotation = self.session.table.at(self._positions, 1)
        self._output = self.session.extend(draft.embed_input_ids(tokens), feature, rotation, visible)
        cache.advance(tokens.shape[1])
        self._positions = [position + 1 for position in self._positions]

    def _extend_ancestors(self, parents: torch.Tensor) -> torch.Tensor:
        """The ancestors of the next level: those of its parents, and each node itself."""
        ancestors = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
        if self._ancestors is not None:
            above = parents[..., None].expand(-1, -1, self._ancestors.shape[-1])
            ancestors = torch.cat((self._ancestors.expand(len(parents), -1, -1).gather(1, above), ancestors), -1)
        self._ancestors = ancestors
        return ancestors


def last_of(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each row's last entry: [B, n, h], of which row b uses the first ``counts[b]`` → [B, 1, h]."""
    if min(counts) == x.shape[1]:
        return x[:, -1:]
    index = torch.tensor(counts, device=x.device)[:, None, None] - 1
    return x.gather(1, index.expand(-1, -1, x.shape[-1]))
