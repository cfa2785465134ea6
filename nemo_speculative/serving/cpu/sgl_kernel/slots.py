"""Bookkeeping of cache slots and positions around a verification.

R requests; ``req_to_token`` int [rows, P] holds the slot of each position, ``req_pool_indices`` int [R] the row of
each request.  ``pool_len`` is P, which the compiled kernels need and a tensor knows.  Every function but
:func:`build_draft_decode_metadata_cpu` writes into one of its arguments.
"""

import ctypes

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start: torch.Tensor, end: torch.Tensor,
    slots: torch.Tensor, pool_len: int,
) -> None:  # fmt: skip
    """Positions start[r] to end[r] of each request get the next of ``slots`` int [Σ (end - start)]."""
    lengths = (end - start).tolist()
    for request, first, part in zip(req_pool_indices.tolist(), start.tolist(), slots.split(lengths), strict=True):
        req_to_token[request, first : first + len(part)] = part.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start: torch.Tensor, end: torch.Tensor,
    slots: torch.Tensor, pool_len: int,
) -> None:  # fmt: skip
    """The reverse: ``slots`` is filled with the slots of positions start[r] to end[r], request after request."""
    bounds = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    stored = torch.cat([req_to_token[request, first:last] for request, first, last in bounds])
    slots[: len(stored)] = stored.to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor,
    pool_len: int, topk: int, num_steps: int,
) -> None:  # fmt: skip
    """``slots`` int [R * topk * num_steps] is filled with those reserved after each sequence for its draft tokens."""
    end = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, end, slots, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, topk: int, num_steps: int,
    pool_len: int,
) -> torch.Tensor:  # fmt: skip
    """A row of slots for each branch of each request: the sequence they share, then the branch's own.

    Args:
        seq_lens: int [R], without draft tokens; after them come ``num_steps`` slots of each branch in turn.

    Returns:
        int [R * topk, P].
    """
    shared = req_to_token[req_pool_indices.long()]
    table = shared.repeat_interleave(topk, dim=0)
    for request, length in enumerate(seq_lens.tolist()):
        own = shared[request, length : length + topk * num_steps].view(topk, num_steps)
        table[request * topk : (request + 1) * topk, length : length + num_steps] = own
    return table


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
) -> None:
    """Moves the accepted tokens' cache rows to the end of the sequence, in every layer.

    Args:
        data_ptrs: uint64 [buffers], addresses of the key and value buffers.
        strides: int [buffers], bytes of a row in each.
        targets, sources: int [n], slots; they may overlap, all is read before anything is written.
    """
    if not len(targets):
        return
    rows = int(torch.cat((targets, sources)).max()) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer[targets.long()] = buffer[sources.long()]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """``bonus_tokens`` [R] is filled with the last accepted token of each request.

    Args:
        accept_tokens: int [R * accept_stride].
        accept_lens: int [R], the bonus token included.
    """
    last = (accept_lens.long() - 1)[:, None]
    bonus_tokens.copy_(accept_tokens.view(-1, accept_stride)[: len(last)].gather(1, last)[:, 0])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """The front of ``accept_out_cache_loc`` is filled with the slots of the accepted tokens.

    Args:
        accept_index: int [R, depth], rows of ``out_cache_loc``; -1 where nothing was accepted.
    """
    slots = out_cache_loc[accept_index[accept_index >= 0].long()]
    accept_out_cache_loc.view(-1)[: len(slots)] = slots.to(accept_out_cache_loc.dtype)


def rotate_input_ids_cpu(
    input_ids: torch.Tensor, extend_start_loc: torch.Tensor, extend_seq_lens: torch.Tensor,
    new_tokens: torch.Tensor, select_index: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Shifts each request's part of ``input_ids`` [T] left by one and puts its new token at the end.

    Args:
        extend_start_loc, extend_seq_lens: int [R], where a part starts and how long it is.
        new_tokens: int [R] or [R, 1].
        select_index: int [R], where the new tokens go instead of the ends.
    """
    ends = extend_start_loc + extend_seq_lens - 1 if select_index is None else select_index
    parts = zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), ends.tolist(), new_tokens.flatten(), strict=True)
    for start, length, end, token in parts:
        if length:
            input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
            input_ids[end] = token
