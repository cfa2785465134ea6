"""A Llama layer as plain functions of a dictionary of weights: the part that the reference losses share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear, pad, silu

Weights = Mapping[str, torch.Tensor]
"""Weights by their names in the served checkpoint, of any floating dtype."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE: turns the pairs (j, j + d/2) of x [B, H, L, d] by positions [B, L] times theta^(-2j/d)."""
    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64, device=x.device) / x.shape[-1])
    angle = positions[:, None, :, None] * frequencies
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def decoder_layer(
    w: Weights, name: str, shape: Any, x: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor,
    memory: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], visible: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The layer ``name`` on the attention's input x [B, L, ·] and the residual [B, L, h].

    Its keys and values are appended to ``memory`` with ``visible``, bool [B, L, L], the keys that each query sees of
    them; the queries see all of ``memory``.
    """
    q, k, v = (
        linear(x, w[f"{name}.self_attn.{p}_proj.weight"]).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        for p in "qkv"
    )
    q, k = (rotate(part, positions, shape.rope_parameters["rope_theta"]) for part in (q, k))
    groups = shape.num_heads // shape.num_kv_heads
    memory.append((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible))
    keys, values, mask = (torch.cat(parts, 2) for parts in zip(*memory, strict=True))
    scores = q @ keys.transpose(2, 3) * shape.head_dim**-0.5
    attended = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ values
    y = residual + linear(attended.transpose(1, 2).flatten(2), w[f"{name}.self_attn.o_proj.weight"])
    n = rms_norm(y, w[f"{name}.post_attention_layernorm.weight"], shape.rms_norm_eps)
    gate, up = linear(n, w[f"{name}.mlp.gate_proj.weight"]), linear(n, w[f"{name}.mlp.up_proj.weight"])
    return y + linear(silu(gate) * up, w[f"{name}.mlp.down_proj.weight"])


def ahead(x: torch.Tensor, n: int, fill: int = 0) -> torch.Tensor:
    """y_t = x_{t+n} along the second dimension, ``fill`` past the end."""
    return pad(x[:, n:], (*([0, 0] * (x.ndim - 2)), 0, min(n, x.shape[1])), value=fill)


def causal_and_diagonal(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, L, L] each: the keys s <= t of the same document, and the key t alone."""
    length = documents.shape[1]
    one = torch.ones(length, length, dtype=torch.bool, device=documents.device)
    same = documents[:, :, None] == documents[:, None]
    return one.tril() & same, torch.eye(length, dtype=torch.bool, device=one.device).expand_as(same)
