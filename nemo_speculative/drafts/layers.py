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
