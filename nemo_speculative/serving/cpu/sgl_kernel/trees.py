"""Trees of draft tokens: their layout for verification, and the accepted path.

R requests with n nodes each.  Node 0 is the last verified token, node i the i-th selected candidate.  Children are
chained: ``next_token`` is a node's first child, ``next_sibling`` the next child of its parent; -1 is none.
"""

import torch

FULL_MASK, NEW_TOKENS_ONLY = 0, 1


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor, selected_index: torch.Tensor, seq_lens: torch.Tensor, tree_mask: torch.Tensor,
    positions: torch.Tensor, retrieve_index: torch.Tensor, next_token: torch.Tensor, next_sibling: torch.Tensor,
    topk: int, depth: int, num_nodes: int, mask_mode: int,
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
        visible = _ancestors(parents)
        positions.view(-1, num_nodes)[r] = length + visible.sum(1) - 1
        masks[r].view(shapes[r])[:, -num_nodes:] = visible
        _link_children(parents, next_token[r], next_sibling[r])


def _parents(parent_list: list[int], selected: list[int], topk: int) -> list[int | None]:
    """The parent of each node; None for the root and for a candidate whose parent was not selected.

    Scores never rise along a branch, but a draft that is certain gives child and parent the same score, and then the
    selection may contain the child alone.
    """
    node_of = {candidate: i + 1 for i, candidate in enumerate(selected)}
    rows = (candidate // topk for candidate in selected)
    return [None, *(node_of.get(parent_list[row]) if row else 0 for row in rows)]


def _ancestors(parents: list[int | None]) -> torch.Tensor:
    """bool [n, n]: each node attends to itself, its ancestors and the root."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    visible[:, 0] = True
    for node, parent in enumerate(parents):
        if parent is not None:
            visible[node] |= visible[parent]
    return visible


def _link_children(parents: list[int | None], next_token: torch.Tensor, next_sibling: torch.Tensor) -> None:
    """Chains the children of each node, the best first; a node without a parent stays unreachable."""
    for node, parent in reversed(list(enumerate(parents))):
        if parent is not None:
            next_sibling[node] = next_token[parent]
            next_token[parent] = node


def verify_tree_greedy_cpu(
    predicts: torch.Tensor, accept_index: torch.Tensor, accept_token_num: torch.Tensor, candidates: torch.Tensor,
    retrive_index: torch.Tensor, retrive_next_token: torch.Tensor, retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
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
