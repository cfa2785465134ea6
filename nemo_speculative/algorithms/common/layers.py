"""Layers of the draft networks: SwiGLU, decoder layer, RMSNorm and rotary embedding."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu
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
        return _GatedLinear.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)  # type: ignore[no-any-return]


class _GatedLinear(torch.autograd.Function):
    """W (silu(gate) * up); keeps gate and up for the backward pass, and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (grad,), (gate, up, weight) = gradients, ctx.saved_tensors
        activated = silu(gate)
        to_weight = grad.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        grad = grad @ weight
        return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), to_weight


class Attention(nn.Module):
    """The four projections, without bias, of inputs of ``width`` features."""

    def __init__(self, shape: Any, width: int):
        super().__init__()
        wide, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, wide, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)


class DraftLayer(nn.Module):
    """A Llama layer in the pieces that training needs: the draft prepares the input of its attention.

    ``input_norm_name`` names the norm before the attention, if the layer has one, as the served checkpoint does.
    """

    def __init__(self, shape: Any, width: int, input_norm_name: str | None = None):
        super().__init__()
        self.head_dim, self.input_norm_name = shape.head_dim, input_norm_name
        if input_norm_name:
            self.add_module(input_norm_name, RMSNorm(shape))
        self.self_attn = Attention(shape, width)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)

    def norm_input(self, residual: torch.Tensor) -> torch.Tensor:
        """The input of the attention in every layer but the first: [..., h]."""
        return self.get_submodule(self.input_norm_name or "")(residual)

    def qkv(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, L, width] → rotated queries and keys, and values: [B, H, L, d], [B, H_kv, L, d] twice."""
        projections = self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def qkv_weight(self, columns: slice = slice(None)) -> torch.Tensor:
        """The weights of queries, keys and values, stacked, for the inputs ``columns``."""
        attention = self.self_attn
        return torch.cat([p.weight[:, columns] for p in (attention.q_proj, attention.k_proj, attention.v_proj)])

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and MLP: [..., h], [..., H * d] → [..., h]."""
        x = residual + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over ``width`` features, by default the draft's hidden size; its backward pass keeps one number per row.

    torch has one kernel for it on CUDA only; elsewhere it keeps every intermediate for the backward pass.
    """

    def __init__(self, shape: Any, width: int | None = None):
        super().__init__(width or shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Compiled, it is fused anyway; and torch 2.11 loses the gradient of a Function that changes a tensor in place.
        if x.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class _RMSNormFunction(torch.autograd.Function):
    """y = w ∘ x r with r = (mean x² + ε)^-½; dx = r (w ∘ dy - x r² mean(w ∘ dy ∘ x)), dw = Σ dy ∘ x r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        wide, grad = x.to(r.dtype), gradients[0].to(r.dtype)
        scaled = wide * r
        to_weight = (grad * scaled).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        shared = (grad * scaled).mean(-1, keepdim=True)
        return grad.sub_(scaled.mul_(shared)).mul_(r).to(x.dtype), to_weight, None


class Rotary(nn.Module):
    """Rotary embedding with the target's scaling; transformers computes the frequencies of every published kind."""

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_positions: int):
        super().__init__()
        config = LlamaConfig(
            head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=dict(rope_parameters)
        )
        self.frequencies = LlamaRotaryEmbedding(config)

    def _apply(self, fn, recurse=True):
        """Moves it but keeps it float32: bfloat16 frequencies are a radian off after a few hundred positions."""
        buffers = dict(self.frequencies.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
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
