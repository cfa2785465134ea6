"""Attention over a paged KV cache with the interface of SGLang's ``intel_amx`` backend.

Shapes: T query rows of all requests together, H query heads and G key-value heads of d dimensions, S cache slots,
R requests.  ``req_to_token`` int [rows, P] holds the slot of each position, ``req_pool_indices`` int [R] the row of
each request.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def decode_attention_cpu(
    q: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, k_scale: float, v_scale: float,
    out: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, loc: torch.Tensor, attn_logits: torch.Tensor,
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, scale: float,
    logit_cap: float, is_cross_attention: bool, window: int, encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:  # fmt: skip
    """One new token of each request: stores its key and value, then attends to all positions of its request.

    Args:
        q, out: [R, H, d]; ``out`` is written.
        k_buffer, v_buffer: [S, G, d]; written at ``loc``.
        k_scale, v_scale: scales of an 8-bit cache, which is not supported.
        k, v: [R, G, d] or flat, or None where the cache holds them already.
        loc: int [R], the slots of the new tokens.
        attn_logits: scratch space of the compiled kernel.
        seq_lens: int64 [R], the new token included.
        window: keys at a distance of this or more are masked; 0 masks none.
        logit_cap, is_cross_attention, encoder_lens, sinks: for models that are not Llama-like; refused.
    """
    _require_llama_like(logit_cap, is_cross_attention, sinks)
    for buffer, new in ((k_buffer, k), (v_buffer, v)):
        if new is not None:
            buffer[loc.long()] = new.reshape(-1, *buffer.shape[1:]).to(buffer.dtype)
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[request, :length].long()
        mask = _causal(1, length, window)
        out[row : row + 1] = _attend(q[row : row + 1], k_buffer[slots], v_buffer[slots], mask, scale)


def extend_attention_cpu(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, out: torch.Tensor, k_buffer: torch.Tensor,
    v_buffer: torch.Tensor, k_scale: float, v_scale: float, req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor, max_extend_len: int, scale: float, logit_cap: float, is_cross_attention: bool,
    window: int, encoder_lens: torch.Tensor | None, sinks: torch.Tensor | None, tree_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:  # fmt: skip
    """Several new tokens of each request: a prefill, or the verification of a chain or a tree of draft tokens.

    Args:
        q, out: [T, H, d]; ``out`` is written.
        k, v: [T, G, d]; not read, because SGLang has stored them in the cache before the call.
        seq_lens: int64 [R], the new tokens included.
        extend_seq_lens, extend_start_loc: int [R], new tokens of each request and where its rows start in ``q``.
        tree_mask: bool [R * n * n], which of the n new tokens each new token attends to; None: causal.
        The other arguments are those of :func:`decode_attention_cpu`.
    """
    _require_llama_like(logit_cap, is_cross_attention or not is_causal, sinks)
    requests = zip(*(x.tolist() for x in (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc)), strict=True)
    for i, (request, length, new, start) in enumerate(requests):
        slots = req_to_token[request, :length].long()
        mask = _causal(new, length, window)
        if tree_mask is not None:
            mask[:, length - new :] = tree_mask.view(-1, new, new)[i]
        rows = slice(start, start + new)
        out[rows] = _attend(q[rows], k_buffer[slots], v_buffer[slots], mask, scale)


def _require_llama_like(logit_cap: float, other_attention: bool, sinks: torch.Tensor | None) -> None:
    if logit_cap > 0 or other_attention or sinks is not None:
        raise NotImplementedError("attention with capped logits, sinks or an encoder: serve this target on a GPU")


def _causal(new: int, length: int, window: int) -> torch.Tensor:
    """bool [new, length]: the causal mask of the last ``new`` of ``length`` positions."""
    distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window) if window > 0 else distance >= 0


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, H, d] over [m, G, d] under bool [n, m] → [n, H, d]."""
    queries, keys, values = (x.transpose(0, 1)[None].to(q.dtype) for x in (q, k, v))
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)
