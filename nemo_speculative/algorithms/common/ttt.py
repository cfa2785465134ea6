"""The training-time test (EAGLE-3, 2503.01840): a draft's teacher-forced steps on its own output, slot by slot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.attention import Pair, unroll_attention
from nemo_speculative.algorithms.common.layers import DraftLayer, rotate
from nemo_speculative.algorithms.common.slots import Layout, Slots

if TYPE_CHECKING:
    from nemo_speculative.algorithms.common.draft import Draft

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


@dataclass(frozen=True)
class Prefix:
    """What slots read of a batch: step 0, as far as it is computed at every position of the share."""

    tokens: torch.Tensor
    """[m, w]: what :meth:`Entry.token` gives."""
    features: torch.Tensor
    """[m, h]"""
    memory: tuple[Pair, ...]
    """Keys and values [H_kv, B * L, d] of each layer, of the whole batch."""
    below: torch.Tensor | None
    """[m, h]: what the last layer reads, where it is not the first."""

    def seen_by(self, slots: Slots) -> "Prefix":
        """Views of what ``slots`` read."""
        return Prefix(
            self.tokens[slots.reads],
            self.features[slots.reads],
            tuple((k[:, slots.keys], v[:, slots.keys]) for k, v in self.memory),
            None if self.below is None else self.below[slots.reads],
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them, always in the same order."""
        ends = [] if self.below is None else [self.below]
        return [self.tokens, self.features, *(x for pair in self.memory for x in pair), *ends]

    def like(self, make: Callable[[torch.Tensor], torch.Tensor]) -> "Prefix":
        """The same of what ``make`` makes of each tensor."""
        return Prefix(
            make(self.tokens),
            make(self.features),
            tuple((make(k), make(v)) for k, v in self.memory),
            None if self.below is None else make(self.below),
        )


def first_pass(draft: "Draft", embeddings: torch.Tensor, features: torch.Tensor, layout: Layout) -> Prefix:
    """Step 0 at every position of the share, as far as slots need it; embeddings and features are [m, h]."""
    stack = _Stack(draft)
    tokens = stack.entry.token(embeddings)
    rotation = stack.rotation(layout.positions, features.dtype)
    below, memory = None, []
    rows = EVERYTHING if stack.deeper else stack.keys_values
    projected, residual = stack.entry.project(tokens.roll(-1, dims=0), features, rows)
    for layer, above in zip(stack.layers, [*stack.deeper, None], strict=True):
        q, *own = stack.split(projected, rotation)
        keys, values = layout.shard.all_gather(*own)
        memory.append((keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()))
        if above:
            attended = unroll_attention(q, memory[-1], layout.block, [])
            below = residual = layer.finish(residual, attended.flatten(1))
            projected = above.project(below, stack.keys_values if above is stack.deeper[-1] else EVERYTHING)
    return Prefix(tokens, features, tuple(memory), below)


def unroll(draft: "Draft", prefix: Prefix, slots: Slots) -> list[torch.Tensor]:
    """See :meth:`nemo_speculative.algorithms.common.draft.Draft.unroll`."""
    steps = _Steps(draft, prefix, slots)
    own: list[list[Pair]] = [[] for _ in draft.stack]
    feature, outputs = prefix.features, []
    for i, alive in enumerate(slots.alive):
        token = prefix.tokens.index_select(0, (slots.index[:alive] + 1 + i).clamp(max=len(prefix.tokens) - 1))
        if i == 0:
            output = steps.first(token)
        else:
            if alive < len(feature):
                feature = feature[:alive]
                own = [[(k[:alive], v[:alive]) for k, v in pairs] for pairs in own]
            output, pairs = steps.later(i, token, feature, own)
            own = [[*before, new] for before, new in zip(own, pairs, strict=True)]
        outputs.append(output)
        feature = draft.feed_back(output)
    return outputs


class _Stack:
    """A draft's layers, with the projections in front of their attention."""

    def __init__(self, draft: "Draft"):
        self.rotary = draft.rotary
        self.layers: Sequence[DraftLayer] = draft.stack
        self.entry = draft.entry()
        self.deeper = [DeeperLayer(layer) for layer in self.layers[1:]]
        attention, self.head_dim = self.layers[0].self_attn, self.layers[0].head_dim
        wide = len(attention.q_proj.weight)
        self.kv_heads = len(attention.k_proj.weight) // self.head_dim
        self.queries, self.keys_values = slice(0, wide), slice(wide, None)

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Pair:
        """cos and sin [n, 1, d]."""
        cos, sin = self.rotary(positions[None], dtype)
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)

    def rotated(self, projected: torch.Tensor, rotation: Pair) -> torch.Tensor:
        return rotate(projected.unflatten(-1, (-1, self.head_dim)), *rotation)

    def split(self, projected: torch.Tensor, rotation: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries (none where they were not projected) and keys, and values: [n, heads, d] each."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        others = heads.shape[1] - self.kv_heads
        turned, values = heads.split((others, self.kv_heads), dim=1)
        q, keys = rotate(turned, *rotation).split((others - self.kv_heads, self.kv_heads), dim=1)
        return q, keys, values


class _Steps(_Stack):
    """The steps of ``slots`` over ``prefix``, of which they see all."""

    def __init__(self, draft: "Draft", prefix: Prefix, slots: Slots):
        super().__init__(draft)
        self.prefix, self.slots = prefix, slots

    def first(self, token: torch.Tensor) -> torch.Tensor:
        """Step 0: the last layer, behind its own keys, which are the causal block's."""
        at = self.slots.index[: len(token)]
        if self.prefix.below is None:
            projected, residual = self.entry.project(token, self.prefix.features.index_select(0, at), self.queries)
        else:
            residual = self.prefix.below.index_select(0, at)
            projected = self.deeper[-1].project(residual, self.queries)
        q = self.rotated(projected, self.rotation(self.slots.places[: len(token)], residual.dtype))
        attended = unroll_attention(q, self.prefix.memory[-1], self.slots.blocks[0], [])
        return self.layers[-1].finish(residual, attended.flatten(1))

    def later(
        self, i: int, token: torch.Tensor, feature: torch.Tensor, own: list[list[Pair]]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """Step i of the slots that are alive; ``own`` holds each layer's keys and values of steps 1 … i - 1."""
        rotation = self.rotation(self.slots.places[: len(token)] + i, feature.dtype)
        block, added = self.slots.blocks[i], []
        projected, residual = self.entry.project(token, feature, EVERYTHING)
        for n, layer in enumerate(self.layers):
            if n:
                projected = self.deeper[n - 1].project(residual)
            q, k, v = self.split(projected, rotation)
            added.append((k, v))
            attended = unroll_attention(q, self.prefix.memory[n], block, [*own[n], (k, v)])
            residual = layer.finish(residual, attended.flatten(1))
        return residual, added
