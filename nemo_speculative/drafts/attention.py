"""Attention of the EAGLE-3 unroll.

At step i the query of slot t sees the step-0 keys of its own document up to t, and the keys of steps 1 … i at its own
slot only (EAGLE-3, training-time test): a causal block plus a diagonal, never an [L, i·L] mask.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def unroll_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    own_keys: Sequence[torch.Tensor],
    own_values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Joint softmax over the visible step-0 keys and a slot's own later keys.

    Args:
        q: [B, H, S, d], the slots' queries.
        keys, values: [B, H_kv, L, d], of step 0, all positions.
        visible: bool [B, S, L].
        own_keys, own_values: i tensors [B, H_kv, S, d], of steps 1 … i.

    Returns:
        [B, H, S, d]
    """
    batch, heads, slots, dim = q.shape
    groups = q.view(batch, keys.shape[1], -1, slots, dim)
    block = torch.einsum("bhgsd,bhld->bhgsl", groups, keys)
    block = block.masked_fill(~visible[:, None, None], float("-inf"))
    own = [(groups * k[:, :, None]).sum(-1, keepdim=True) for k in own_keys]
    scores = torch.cat([block, *own], dim=-1).float() * dim**-0.5
    weights = scores.softmax(-1).to(values.dtype)
    length = keys.shape[2]
    out = torch.einsum("bhgsl,bhld->bhgsd", weights[..., :length], values)
    for i, v in enumerate(own_values):
        out = out + weights[..., length + i, None] * v[:, :, None]
    return out.reshape(batch, heads, slots, dim)


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
