"""The training-time test (EAGLE-3, 2503.01840): a draft's teacher-forced steps on its own output, slot by slot."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import linear

from nemo_speculative.drafts.attention import Pair, unroll_attention
from nemo_speculative.drafts.layers import DraftLayer, rotate
from nemo_speculative.drafts.slots import Slots

if TYPE_CHECKING:
    from nemo_speculative.drafts.base import Draft

EVERYTHING = slice(None)


class Entry(Protocol):
    """The first layer's queries, keys and values; the token's share is the same at every step, and computed once."""

    def token(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[n, h] → [n, w]."""
        ...

    def project(self, token: torch.Tensor, feature: torch.Tensor, rows: slice) -> Pair:
        """[n, w], [n, h] → ``rows`` of [n, (H + 2 * H_kv) * d], and the layer's residual [n, h]."""
        ...


class DeeperLayer:
    """The same of a layer that reads the one below."""

    def __init__(self, layer: DraftLayer):
        self.layer, self.weight = layer, layer.qkv_weight()

    def project(self, residual: torch.Tensor, rows: slice = EVERYTHING) -> torch.Tensor:
        return linear(self.layer.normed(residual), self.weight[rows])


def unroll(
    draft: "Draft", embeddings: torch.Tensor, features: torch.Tensor, slots: Slots, run_step: Callable[..., Any]
) -> list[torch.Tensor]:
    """See :meth:`nemo_speculative.drafts.base.Draft.unroll`; embeddings and features are [B * L, h] here."""
    steps = _Unroll(draft, slots)
    tokens = steps.entry.token(embeddings)
    memory, below = steps.first_pass(tokens.roll(-1, dims=0), features)

    own: list[list[Pair]] = [[] for _ in draft.stack]
    feature, outputs = features, []
    for i, alive in enumerate(slots.alive):
        token = tokens.index_select(0, (slots.index[:alive] + 1 + i).clamp(max=len(tokens) - 1))
        if i == 0:
            output = run_step(steps.first, token, feature.index_select(0, slots.index[:alive]), memory, below)
        else:
            if alive < len(feature):
                feature = feature[:alive]
                own = [[(k[:alive], v[:alive]) for k, v in pairs] for pairs in own]
            output, pairs = run_step(steps.later, i, token, feature, memory, own)
            own = [[*before, new] for before, new in zip(own, pairs, strict=True)]
        outputs.append(output)
        feature = draft.feed_back(output)
    return outputs


class _Unroll:
    """What the steps of one batch share."""

    def __init__(self, draft: "Draft", slots: Slots):
        self.slots, self.rotary = slots, draft.rotary
        self.stack: Sequence[DraftLayer] = draft.stack
        self.entry = draft.entry()
        self.deeper = [DeeperLayer(layer) for layer in self.stack[1:]]
        attention, self.head_dim = self.stack[0].self_attn, self.stack[0].head_dim
        self.kv_heads = len(attention.k_proj.weight) // self.head_dim
        self.queries, self.rest = slice(0, len(attention.q_proj.weight)), slice(len(attention.q_proj.weight), None)

    def first_pass(self, tokens: torch.Tensor, features: torch.Tensor) -> tuple[list[Pair], torch.Tensor | None]:
        """Step 0 at every position, as far as the slots need it: [B * L, w], [B * L, h].

        Returns:
            Keys and values [H_kv, B * L, d] of each layer, and what the last layer reads, where it is not the first.
        """
        rotation = self._rotation(self.slots.positions, features.dtype)
        below, memory = None, []
        projected, residual = self.entry.project(tokens, features, EVERYTHING if self.deeper else self.rest)
        for layer, above in zip(self.stack, [*self.deeper, None], strict=True):
            q, keys, values = self._split(projected, rotation)
            memory.append((keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()))
            if above:
                attended = unroll_attention(q, memory[-1], self.slots.everywhere, [])
                below = residual = layer.finish(residual, attended.flatten(1))
                projected = above.project(below, self.rest if above is self.deeper[-1] else EVERYTHING)
        return memory, below

    def first(self, token: torch.Tensor, feature: torch.Tensor, memory: list[Pair], below: torch.Tensor | None):
        """Step 0 of the slots: the last layer, behind its own keys, which are the causal block's."""
        at = self.slots.index[: len(token)]
        if below is None:
            projected, residual = self.entry.project(token, feature, self.queries)
        else:
            residual = below.index_select(0, at)
            projected = self.deeper[-1].project(residual, self.queries)
        q = self._rotated(projected, self._rotation(self.slots.places[: len(token)], feature.dtype))
        attended = unroll_attention(q, memory[-1], self.slots.blocks[0], [])
        return self.stack[-1].finish(residual, attended.flatten(1))

    def later(self, i: int, token: torch.Tensor, feature: torch.Tensor, memory: list[Pair], own: list[list[Pair]]):
        """Step i of the slots that are alive; ``own`` holds each layer's keys and values of steps 1 … i - 1."""
        rotation = self._rotation(self.slots.places[: len(token)] + i, feature.dtype)
        block, added = self.slots.blocks[i], []
        projected, residual = self.entry.project(token, feature, EVERYTHING)
        for n, layer in enumerate(self.stack):
            if n:
                projected = self.deeper[n - 1].project(residual)
            q, k, v = self._split(projected, rotation)
            added.append((k, v))
            attended = unroll_attention(q, memory[n], block, [*own[n], (k, v)])
            residual = layer.finish(residual, attended.flatten(1))
        return residual, added

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Pair:
        """cos and sin [n, 1, d]."""
        cos, sin = self.rotary(positions[None], dtype)
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)

    def _rotated(self, projected: torch.Tensor, rotation: Pair) -> torch.Tensor:
        return rotate(projected.unflatten(-1, (-1, self.head_dim)), *rotation)

    def _split(self, projected: torch.Tensor, rotation: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries (none where they were not projected) and keys, and values: [n, heads, d] each."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        others = heads.shape[1] - self.kv_heads
        turned, values = heads.split((others, self.kv_heads), dim=1)
        q, keys = rotate(turned, *rotation).split((others - self.kv_heads, self.kv_heads), dim=1)
        return q, keys, values
