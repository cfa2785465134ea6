"""The functions of ``sgl_kernel`` that SGLang 0.5.23's CPU engine calls for a Llama-like target with an EAGLE draft.

Plain torch code, one request after the other: for testing a checkpoint with SGLang itself, not for serving traffic.
``convert_weight_packed`` is missing on purpose: SGLang looks it up to detect compiled kernels, and without it uses its
own torch code for norms, activations, rotary positions and linear layers.

Shapes: R requests with T query rows together, H query heads and G key-value heads of d dimensions, S cache slots.
``req_to_token`` int [rows, P] holds the slot of each position, ``req_pool_indices`` int [R] the row of each request.
``pool_len`` is P, which the compiled kernels need and a tensor knows.

A tree has n nodes for each request: node 0 is the last verified token, node i the i-th selected candidate.  Children
are chained: ``next_token`` is a node's first child, ``next_sibling`` the next child of its parent; -1 is none.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__version__ = "0.5.23+plain.torch"
FULL_MASK, NEW_TOKENS_ONLY = 0, 1


def decode_attention_cpu(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, k_scale: float, v_scale: float, out: Tensor, k: Tensor | None,
    v: Tensor | None, loc: Tensor, attn_logits: Tensor, req_to_token: Tensor, req_pool_indices: Tensor,
    seq_lens: Tensor, scale: float, logit_cap: float, is_cross_attention: bool, window: int,
    encoder_lens: Tensor | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    """One new token of each request: stores its key and value, then attends to all positions of its request.

    Args:
        q, out: [R, H, d]; ``out`` is written.
        k_buffer, v_buffer: [S, G, d]; written at ``loc``.
        k, v: [R, G, d] or flat, or None where the cache holds them already.
        loc: int [R], the slots of the new tokens.
        seq_lens: int64 [R], the new token included.
        window: keys at a distance of this or more are masked; 0 masks none.
        logit_cap, is_cross_attention, encoder_lens, sinks: for models that are not Llama-like; refused.
        k_scale, v_scale, attn_logits: not read.
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
    q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, k_buffer: Tensor, v_buffer: Tensor, k_scale: float,
    v_scale: float, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, extend_seq_lens: Tensor,
    extend_start_loc: Tensor, max_extend_len: int, scale: float, logit_cap: float, is_cross_attention: bool,
    window: int, encoder_lens: Tensor | None, sinks: Tensor | None, tree_mask: Tensor | None, is_causal: bool,
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


# SGLang looks these two up as torch.ops.sgl_kernel.*; an attribute answers as well as a registered operator.
for kernel in (decode_attention_cpu, extend_attention_cpu):
    setattr(torch.ops.sgl_kernel, kernel.__name__, kernel)


def _require_llama_like(logit_cap: float, other_attention: bool, sinks: Tensor | None) -> None:
    if logit_cap > 0 or other_attention or sinks is not None:
        raise NotImplementedError("attention with capped logits, sinks or an encoder: serve this target on a GPU")


def _causal(new: int, length: int, window: int) -> Tensor:
    """bool [new, length]: the causal mask of the last ``new`` of ``length`` positions."""
    distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window) if window > 0 else distance >= 0


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[n, H, d] over [m, G, d] under bool [n, m] → [n, H, d]."""
    queries, keys, values = (x.transpose(0, 1)[None].to(q.dtype) for x in (q, k, v))
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Positions start[r] to end[r] of each request get the next of ``slots`` int [Σ (end - start)]."""
    lengths = (end - start).tolist()
    for request, first, part in zip(req_pool_indices.tolist(), start.tolist(), slots.split(lengths), strict=True):
        req_to_token[request, first : first + len(part)] = part.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool_len: int
) -> None:
    """The reverse: ``slots`` is filled with the slots of positions start[r] to end[r], request after request."""
    bounds = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    stored = torch.cat([req_to_token[request, first:last] for request, first, last in bounds])
    slots[: len(stored)] = stored.to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, seq_lens: Tensor, slots: Tensor, pool_len: int, topk: int,
    num_steps: int,
) -> None:  # fmt: skip
    """``slots`` int [R * topk * num_steps] is filled with those reserved after each sequence for its draft tokens."""
    end = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, end, slots, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, topk: int, num_steps: int, pool_len: int
) -> Tensor:
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


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
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


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int) -> None:
    """``bonus_tokens`` [R] is filled with the last of each request's ``accept_lens`` [R] accepted tokens."""
    last = (accept_lens.long() - 1)[:, None]
    bonus_tokens.copy_(accept_tokens.view(-1, accept_stride)[: len(last)].gather(1, last)[:, 0])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """The front of ``accept_out_cache_loc`` is filled with the slots of the accepted tokens.

    ``accept_index`` int [R, depth] holds rows of ``out_cache_loc``; -1 where nothing was accepted.
    """
    slots = out_cache_loc[accept_index[accept_index >= 0].long()]
    accept_out_cache_loc.view(-1)[: len(slots)] = slots.to(accept_out_cache_loc.dtype)


def rotate_input_ids_cpu(
    input_ids: Tensor, extend_start_loc: Tensor, extend_seq_lens: Tensor, new_tokens: Tensor,
    select_index: Tensor | None = None,
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


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor, selected_index: Tensor, seq_lens: Tensor, tree_mask: Tensor, positions: Tensor,
    retrieve_index: Tensor, next_token: Tensor, next_sibling: Tensor, topk: int, depth: int, num_nodes: int,
    mask_mode: int,
) -> None:  # fmt: skip
    """Links the selected candidates to a tree.

    A candidate's number divided by ``topk`` is the row of its parent in ``parent_list``, which holds the parent's
    number; row 0 stands for the root.

    Args:
        parent_list: int64 [R, rows].
        selected_index: int64 [R, n - 1], the candidates' numbers, ascending, so that parents precede children.
        seq_lens: int [R], without draft tokens.
        tree_mask: bool, flat, written: [n, n] for each request, the nodes that a node attends to; in mode 0
            preceded by ``seq_lens`` columns of the sequence, which are left unchanged.
        positions: int64 [R * n], written.
        retrieve_index, next_token, next_sibling: int64 [R, n], filled with -1, written.
        depth: steps of the draft.
        mask_mode: 0 or 1, see ``tree_mask``.
    """
    if mask_mode not in (FULL_MASK, NEW_TOKENS_ONLY):
        raise NotImplementedError(f"a tree mask of mode {mask_mode}: the CPU engine uses mode 0 or 1")
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    lengths = seq_lens.tolist()
    shapes = [(num_nodes, num_nodes + (length if mask_mode == FULL_MASK else 0)) for length in lengths]
    masks = tree_mask.view(-1)[: sum(rows * columns for rows, columns in shapes)]
    masks = masks.split([rows * columns for rows, columns in shapes])
    for r, length in enumerate(lengths):
        parents = _parents(parent_list[r].tolist(), selected_index[r].tolist(), topk)
        visible = torch.eye(num_nodes, dtype=torch.bool)  # of each node: itself, its ancestors and the root
        visible[:, 0] = True
        for node, parent in enumerate(parents):
            if parent is not None:
                visible[node] |= visible[parent]
        positions.view(-1, num_nodes)[r] = length + visible.sum(1) - 1
        masks[r].view(shapes[r])[:, -num_nodes:] = visible
        # The best child comes first in its chain; a node without a parent stays unreachable.
        for node, parent in reversed(list(enumerate(parents))):
            if parent is not None:
                next_sibling[r, node] = next_token[r, parent]
                next_token[r, parent] = node


def _parents(parent_list: list[int], selected: list[int], topk: int) -> list[int | None]:
    """The parent of each node; None for the root and for a candidate whose parent was not selected.

    Scores never rise along a branch, but a draft that is certain gives child and parent the same score, and then the
    selection may contain the child alone.
    """
    node_of = {candidate: i + 1 for i, candidate in enumerate(selected)}
    rows = (candidate // topk for candidate in selected)
    return [None, *(node_of.get(parent_list[row]) if row else 0 for row in rows)]


def verify_tree_greedy_cpu(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrive_index: Tensor,
    retrive_next_token: Tensor, retrive_next_sibling: Tensor, target_predict: Tensor,
) -> None:  # fmt: skip
    """Follows the target's choices down the tree while a child matches.  ("retrive" is SGLang's spelling.)

    Args:
        predicts: int32 [R * n], written: the target's choice after each accepted node.
        accept_index: int32 [R, depth + 1], filled with -1, written: the accepted nodes, the root first.
        accept_token_num: int32 [R], written: accepted draft tokens, the root not counted.
        candidates: int64 [R, n], the token of each node.
        retrive_index: int64 [R, n], where each node is among all requests' nodes.
        retrive_next_token, retrive_next_sibling: int64 [R, n].
        target_predict: int64 [R, n], the target's choice after each node.
    """
    choices = target_predict.reshape(-1)
    for r in range(len(candidates)):
        best = choices[retrive_index[r]].tolist()
        tree = (retrive_next_token[r].tolist(), retrive_next_sibling[r].tolist(), candidates[r].tolist())
        path = _accepted_path(best, *tree, accept_index.shape[1])
        accepted = retrive_index[r, path]
        accept_index[r, : len(path)] = accepted.to(accept_index.dtype)
        accept_token_num[r] = len(path) - 1
        predicts[accepted] = choices[accepted].to(predicts.dtype)


def _accepted_path(
    best: list[int], next_token: list[int], next_sibling: list[int], tokens: list[int], longest: int
) -> list[int]:
    path = [0]
    while len(path) < longest:
        node = next_token[path[-1]]
        while node >= 0 and tokens[node] != best[path[-1]]:
            node = next_sibling[node]
        if node < 0:
            break
        path.append(node)
    return path
