"""The EAGLE-3 draft network (2503.01840): one decoder layer on the target's aux hidden states.

Notable choices:
- parameter names are those of the served checkpoint, so exporting renames nothing;
- layer and fc have no bias; q, k and v read [embedding ; feature], the embedding first;
- the residual is the un-normed feature; the next step is fed the layer's output before the final norm;
- the embedding is the target's, frozen and held outside: a server overwrites it with the target's anyway;
- d2t holds offsets (target id = j + d2t[j]), t2d is a mask over the target's vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_speculative.drafts.attention import cached_attention, unroll_attention
from nemo_speculative.drafts.layers import Rotary, SwiGLU, rotate


@dataclass(frozen=True)
class Eagle3Shape:
    """Every number that shapes the network."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_parameters: dict[str, Any]
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    aux_layers: tuple[int, ...]

    @classmethod
    def like_target(cls, target_config: Any, aux_layers: list[int], draft_vocab_size: int) -> "Eagle3Shape":
        """A draft whose layer has the shape of one of the target's."""
        heads = target_config.num_attention_heads
        return cls(
            hidden_size=target_config.hidden_size,
            intermediate_size=target_config.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(target_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
            rms_norm_eps=getattr(target_config, "rms_norm_eps", 1e-6),
            max_positions=target_config.max_position_embeddings,
            rope_parameters=_full_attention_rope(target_config),
            vocab_size=target_config.vocab_size,
            draft_vocab_size=draft_vocab_size,
            aux_layers=tuple(aux_layers),
        )

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the network."""
        h, inner = self.hidden_size, self.intermediate_size
        attention = (
            2 * h * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.num_heads * self.head_dim * h
        )
        return len(self.aux_layers) * h * h + attention + 3 * h * inner + 4 * h + self.draft_vocab_size * h


def _full_attention_rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    return dict(rope.get("full_attention", rope))


class Eagle3Attention(nn.Module):
    def __init__(self, shape: Eagle3Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        wide, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(2 * shape.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)

    def heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """[B, L, 2h] → [B, H, L, d]."""
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """[B, H, L, d] → [B, L, h]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Eagle3Layer(nn.Module):
    def __init__(self, shape: Eagle3Shape):
        super().__init__()
        norm = lambda: nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)  # noqa: E731
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = norm(), norm(), norm()
        self.self_attn = Eagle3Attention(shape)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)

    def attention_input(self, normed_embedding: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """[embedding ; feature], both normed: [B, L, 2h]."""
        return torch.cat((normed_embedding, self.hidden_norm(feature)), dim=-1)

    def finish(self, feature: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and MLP: [B, L, h]."""
        x = feature + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Draft(nn.Module):
    """See the module's text.  ``unroll`` is its use in training, ``extend`` in decoding."""

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, shape: Eagle3Shape):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(len(shape.aux_layers) * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(shape)
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)
        self.rotary = Rotary(shape.rope_parameters, shape.head_dim, shape.max_positions)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.ones(shape.vocab_size, dtype=torch.bool))

    @property
    def draft_ids(self) -> torch.Tensor:
        """int64 [V_d]: the target ids of the draft vocabulary, ascending."""
        return torch.arange(self.shape.draft_vocab_size, device=self.d2t.device) + self.d2t

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[..., h], as ``unroll`` and ``extend`` return it → [..., V_d]."""
        return self.lm_head(self.norm(output))

    def unroll(
        self,
        embeddings: torch.Tensor,
        aux: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor,
        slots: torch.Tensor,
        num_steps: int,
        run_step=lambda step, *args: step(*args),
    ) -> list[torch.Tensor]:
        """The training-time test: ``num_steps`` teacher-forced steps of every slot.

        Step i of slot t reads the embedding of x_{t+1+i}, at position t + i.  After the step-0 keys and values a slot
        touches no other, so everything else is computed for the given slots only.

        Args:
            embeddings: [B, L, h] of the tokens x_t, from the target.
            aux: [B, L, A * h].
            positions, documents: int64 [B, L].
            slots: int64 [B, S].
            run_step: runs one step; the trainer passes activation checkpointing here.

        Returns:
            ``num_steps`` layer outputs [B, S, h], before the final norm.
        """
        dtype, layer = self.fc.weight.dtype, self.midlayer
        tokens = layer.input_layernorm(_next(embeddings, 1).to(dtype))
        features = self.fc(aux.to(dtype))
        x = layer.attention_input(tokens, features)
        cos, sin = self.rotary(positions, dtype)
        keys = rotate(layer.self_attn.heads(layer.self_attn.k_proj, x), cos, sin)
        values = layer.self_attn.heads(layer.self_attn.v_proj, x)
        visible = _visible(documents, slots)
        at = positions.gather(1, slots)

        feature = _rows(features, slots)
        own: tuple[torch.Tensor, ...] = ()
        outputs = []
        for i in range(num_steps):
            token = _rows(tokens, (slots + i).clamp(max=tokens.shape[1] - 1))
            feature, *own_pair = run_step(self._slot_step, i, feature, token, at + i, keys, values, visible, *own)
            own = (*own, *own_pair)
            outputs.append(feature)
        return outputs

    def _slot_step(self, i, feature, token, positions, keys, values, visible, *own):
        """One step of all slots; ``own`` holds the keys and values of steps 1 … i - 1 in turn."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        x = layer.attention_input(token, feature)
        cos, sin = self.rotary(positions, x.dtype)
        if i > 0:  # step 0's own key is among the causal block's
            own = (*own, rotate(attention.heads(attention.k_proj, x), cos, sin), attention.heads(attention.v_proj, x))
        q = rotate(attention.heads(attention.q_proj, x), cos, sin)
        attended = unroll_attention(q, keys, values, visible, own[0::2], own[1::2])
        return layer.finish(feature, attended), *(own[-2:] if i > 0 else ())

    def extend(
        self,
        embeddings: torch.Tensor,
        feature: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: "DraftCache",
    ) -> torch.Tensor:
        """Decoding: the layer on new positions behind ``cache``, which it extends.

        Args:
            embeddings: [1, n, h] of the tokens after those positions.
            feature: [1, n, h]: fc of the aux states, or the output of the step before.
            rotation: cos and sin [1, 1, n, d] of those positions, from ``rotary``.

        Returns:
            Layer outputs [1, n, h].
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        x = layer.attention_input(layer.input_layernorm(embeddings), feature)
        cos, sin = rotation
        key = rotate(attention.heads(attention.k_proj, x), cos, sin)
        keys, values = cache.append(key, attention.heads(attention.v_proj, x))
        q = rotate(attention.heads(attention.q_proj, x), cos, sin)
        return layer.finish(feature, cached_attention(q, keys, values))


class DraftCache:
    """Keys and values of one sequence, grown in place and cut back after verification."""

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [1, H_kv, n, d] and returns all of it, [1, H_kv, length, d]."""
        end = self.length + key.shape[2]
        if self._keys.ndim == 1 or end > self._keys.shape[2]:
            self._grow(key, end)
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def crop(self, length: int) -> None:
        self.length = length

    def _grow(self, like: torch.Tensor, needed: int) -> None:
        room = like.new_empty(2, 1, like.shape[1], max(256, 2 * needed), like.shape[3])
        if self.length:
            room[0, :, :, : self.length] = self._keys[:, :, : self.length]
            room[1, :, :, : self.length] = self._values[:, :, : self.length]
        self._keys, self._values = room[0], room[1]


def _next(x: torch.Tensor, n: int) -> torch.Tensor:
    """y[:, t] = x[:, t + n]; the last n wrap around, and are never supervised."""
    return x.roll(-n, dims=1)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, s]]: [B, L, h], [B, S] → [B, S, h]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _visible(documents: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """bool [B, S, L]: same document, not after the slot."""
    here = torch.arange(documents.shape[1], device=documents.device)
    return (documents.gather(1, slots)[..., None] == documents[:, None]) & (here <= slots[..., None])
