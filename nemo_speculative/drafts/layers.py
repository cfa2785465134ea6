"""The parts that draft networks share."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """The four projections, without bias; ``width`` features go in."""

    def __init__(self, shape: Any, width: int):
        super().__init__()
        wide, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, wide, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)


class DraftLayer(nn.Module):
    """A Llama layer in the pieces that an unroll needs: what its attention reads is the draft's business.

    ``input_norm_name`` is the name that the served checkpoint gives to the norm in front of the attention; None where
    the layer has none, or the draft applies its own.
    """

    def __init__(self, shape: Any, width: int, input_norm_name: str | None = None):
        super().__init__()
        self.head_dim, self.feature_size = shape.head_dim, shape.hidden_size
        self.input_norm_name = input_norm_name
        if input_norm_name:
            self.add_module(input_norm_name, rms_norm(shape))
        self.self_attn = Attention(shape, width)
        self.post_attention_layernorm = rms_norm(shape)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """What the attention of a layer that is not the first reads: [..., h]."""
        return self.get_submodule(self.input_norm_name or "")(residual)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, width] → [B, H, L, d], not yet rotated."""
        return self._heads(self.self_attn.q_proj, x)

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L, width] → rotated keys and values, [B, H_kv, L, d] each."""
        return rotate(self._heads(self.self_attn.k_proj, x), cos, sin), self._heads(self.self_attn.v_proj, x)

    def qkv_weight(self, columns: slice = slice(None)) -> torch.Tensor:
        """The weights of queries, keys and values, one below the other, of the inputs ``columns``."""
        attention = self.self_attn
        return torch.cat([p.weight[:, columns] for p in (attention.q_proj, attention.k_proj, attention.v_proj)])

    def _heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and MLP: [..., h], [..., H * d] → [..., h]."""
        x = residual + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def rms_norm(shape: Any, width: int | None = None) -> nn.RMSNorm:
    """An RMSNorm over ``width`` features, by default the draft's hidden size."""
    return nn.RMSNorm(width or shape.hidden_size, eps=shape.rms_norm_eps)


class Rotary(nn.Module):
    """Rotary embedding with the target's scaling; transformers computes the frequencies of every published kind."""

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_positions: int):
        super().__init__()
        config = LlamaConfig(
            head_dim=head_dim,
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=max_positions,
            rope_parameters=dict(rope_parameters),
        )
        self.frequencies = LlamaRotaryEmbedding(config)

    def _apply(self, fn, recurse=True):
        """Moves with the module, stays float32: bfloat16 frequencies are a radian off within some hundred positions."""
        exact = dict(self.frequencies.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self.frequencies, name, buffer.to(getattr(self.frequencies, name).device))
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, 1, L, d] for ``positions`` int64 [B, L]."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.frequencies(like, positions)
        return cos[:, None], sin[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary positions to [B, H, L, d] (halves layout, as Llama has it)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
