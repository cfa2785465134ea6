"""Autoregressive drafting: a draft over its KV cache reads the target's features once, then its own outputs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from nemo_speculative.algorithms.common.attention import Pair
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.kv_cache import KVCache
from nemo_speculative.algorithms.common.layers import rotate

FIRST_POSITIONS = 512


class RotaryTable:
    """Cosines and sines of a draft's positions: recomputing them would cost as much as the rest of a draft step."""

    def __init__(self, draft: Draft, device: torch.device):
        self.draft, self.device = draft, device
        self._table = self._compute(FIRST_POSITIONS)

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
        cos, sin = self.draft.rotary(torch.arange(length, device=self.device)[None], self.draft.dtype)
        return cos, sin


class DraftSession(ABC):
    """Drafting for one batch of sequences: a draft and its KV cache of them; one subclass per algorithm."""

    def __init__(self, draft: Any, batch_size: int = 1, table: RotaryTable | None = None):
        self.draft, self.cache = draft, KVCache(batch_size)
        self.device = draft.decoder_layers[0].self_attn.q_proj.weight.device
        self.table = table or RotaryTable(draft, self.device)

    @classmethod
    def check_target(cls, draft: Any, aux_layers: Sequence[int]) -> None:
        """Checks that a target with these aux layers gives what ``draft`` reads.

        Raises:
            ValueError: the draft reads other layers.
        """
        return

    @abstractmethod
    def first_layer_input(self, embeddings: torch.Tensor, feature: torch.Tensor) -> Pair:
        """The input of the first layer's attention, [..., h] each → [..., width], and its residual [..., h]."""

    def extend(
        self, embeddings: torch.Tensor, feature: torch.Tensor, rotation: Pair, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the layers on n new positions of each sequence, and writes their keys and values after its length.

        Args:
            embeddings: [B, n, h] of the tokens after those positions.
            feature: [B, n, h], from ``project_hidden_states``, or from ``next_feature`` of the step before.
            rotation: cos and sin [B or 1, 1, n, d] of those positions.
            visible: bool [B, n, m] over the m cached positions, the new ones last; None: causal.

        Returns:
            Outputs of the last layer [B, n, h].
        """
        cos, sin = rotation
        x, residual = self.first_layer_input(embeddings, feature)
        for n, layer in enumerate(self.draft.decoder_layers):
            if n:
                x = layer.norm_input(residual)
            keys, values = self.cache.append(n, *layer.keys_values(x, cos, sin))
            attended = cached_attention(rotate(layer.queries(x), cos, sin), keys, values, visible)
            residual = layer.finish(residual, attended.transpose(1, 2).flatten(2))
        return residual

    def prefill(
        self, next_tokens: torch.Tensor, aux_hidden_states: torch.Tensor, last_hidden_state: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:  # fmt: skip
        """Reads the target's states at verified positions.

        Args:
            next_tokens: int64 [B, n], the token after each position.
            aux_hidden_states, last_hidden_state: [B, n, A * h], [B, n, h].
            counts: the number of positions of each sequence; the others are padding.

        Returns:
            The output at each sequence's last position: [B, 1, h].
        """
        longest = next_tokens.shape[1]
        feature = self.draft.project_hidden_states(aux_hidden_states, last_hidden_state)
        visible = None
        if self.cache.ragged:
            visible = self.cache.visible(feature.new_ones(1, longest, longest, dtype=torch.bool).tril())
        rotation = self.table.at(self.cache.lengths, longest)
        output = self.extend(self.draft.embed_input_ids(next_tokens), feature, rotation, visible)
        self.cache.advance(counts)
        if min(counts) == longest:
            return output[:, -1:]
        last = torch.tensor(counts, device=output.device)[:, None, None] - 1
        return output.gather(1, last.expand(-1, -1, output.shape[-1]))


class SessionCursor:
    """A session's draft at the newest level of the trees that it proposes, w nodes wide; starts at the root.

    The levels are in the session's cache, after the sequences; the caller crops it.  Implements
    ``decoding.tree_builder.DraftCursor``.
    """

    def __init__(self, session: DraftSession, root: torch.Tensor, output: torch.Tensor, ids: torch.Tensor):
        self.session, self.root, self.ids, self._output = session, root, ids, output
        self._positions = list(session.cache.lengths)
        self._ancestors: torch.Tensor | None = None
        """bool [B or 1, w, s]: which of the s nodes so far each node sees; None: chains, or no nodes yet."""

    @property
    def logits(self) -> torch.Tensor:
        return self.session.draft.compute_logits(self._output)  # type: ignore[no-any-return]

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        draft, cache = self.session.draft, self.session.cache
        feature = draft.next_feature(self._output)
        visible = None
        if parents is not None:
            wide = parents.expand(len(tokens), -1)[..., None]
            feature = feature.gather(1, wide.expand(-1, -1, feature.shape[-1]))
            visible = cache.visible(self._extend_ancestors(parents))
        elif cache.ragged:
            visible = cache.visible(tokens.new_ones(1, 1, 1, dtype=torch.bool))
        rotation = self.session.table.at(self._positions, 1)
        self._output = self.session.extend(draft.embed_input_ids(tokens), feature, rotation, visible)
        cache.advance(tokens.shape[1])
        self._positions = [position + 1 for position in self._positions]

    def _extend_ancestors(self, parents: torch.Tensor) -> torch.Tensor:
        """The ancestors of the next level: those of its parents, and each node itself."""
        itself = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
        if self._ancestors is None:
            self._ancestors = itself
        else:
            above = parents[..., None].expand(-1, -1, self._ancestors.shape[-1])
            self._ancestors = torch.cat((self._ancestors.expand(len(parents), -1, -1).gather(1, above), itself), -1)
        return self._ancestors


def cached_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the newest n positions over a cache: [B, H, n, d] over [B, H_kv, m, d].

    ``visible`` is bool [B, n, m]; None: causal, the n positions being the last of the m.
    """
    new, cached = q.shape[2], keys.shape[2]
    if visible is not None:
        mask: torch.Tensor | None = visible[:, None]
    else:
        mask = torch.ones(new, cached, dtype=torch.bool, device=q.device).tril(cached - new) if new > 1 else None
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
