"""The stand-in ``sgl_kernel`` against textbook definitions, function by function; tests/sglang runs it in SGLang."""

import pytest
import torch

from nemo_speculative.serving.cpu import sgl_kernel

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 8, 32
NO_EXTRAS = (0.0, False)


def textbook(q, k, v, mask):
    """[n, H, d] over [m, G, d]: softmax(q k / √d) v, one head after the other."""
    out = torch.empty_like(q)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = (q[:, head] @ k[:, group].T / DIM**0.5).masked_fill(~mask, float("-inf"))
        out[:, head] = scores.softmax(-1) @ v[:, group]
    return out


@pytest.fixture
def cache():
    """Key and value buffers, and two requests of 7 and 4 positions in scattered slots."""
    torch.manual_seed(0)
    table = torch.zeros(3, 10, dtype=torch.int32)
    table[2, :7] = torch.tensor([5, 1, 9, 30, 2, 17, 8])
    table[0, :4] = torch.tensor([3, 31, 12, 0])
    return torch.randn(SLOTS, KV_HEADS, DIM), torch.randn(SLOTS, KV_HEADS, DIM), table


def decode(cache, q, k, v, window=0):
    keys, values, table = cache
    out = torch.empty_like(q)
    slots = torch.tensor([8, 0])
    sgl_kernel.decode_attention_cpu(q, keys, values, 1.0, 1.0, out, k, v, slots, None, table, torch.tensor([2, 0]),
                                    torch.tensor([7, 4]), DIM**-0.5, *NO_EXTRAS, window, None, None)  # fmt: skip
    return out


def extend(cache, q, new, tree_mask=None, **changed):
    keys, values, table = cache
    out = torch.empty_like(q)
    values_by_name = {"logit_cap": 0.0, "is_cross_attention": False, "sinks": None, "is_causal": True} | changed
    sgl_kernel.extend_attention_cpu(
        q, None, None, out, keys, values, 1.0, 1.0, table, torch.tensor([2, 0]), torch.tensor([7, 4]),
        torch.tensor(new), torch.tensor([0, new[0]]), max(new), DIM**-0.5, window=0, encoder_lens=None,
        tree_mask=tree_mask, **values_by_name,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("window", [0, 3])
def test_decode_stores_the_new_token_and_attends_to_all_before_it(cache, window):
    keys, values, table = cache
    q, k, v = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS * DIM), torch.randn(2, KV_HEADS, DIM)
    out = decode(cache, q, k, v, window)
    assert torch.equal(keys[8], k.view(2, KV_HEADS, DIM)[0]) and torch.equal(values[0], v[1])
    for row, (request, length) in enumerate([(2, 7), (0, 4)]):
        seen = table[request, :length].long()[-window:]
        expected = textbook(q[row : row + 1], keys[seen], values[seen], torch.ones(1, len(seen), dtype=torch.bool))
        torch.testing.assert_close(out[row : row + 1], expected)


def test_extend_is_causal(cache):
    keys, values, table = cache
    q = torch.randn(5, HEADS, DIM)
    out = extend(cache, q, [3, 2])
    for request, length, rows in ((2, 7, slice(0, 3)), (0, 4, slice(3, 5))):
        new, slots = rows.stop - rows.start, table[request, :length].long()
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        torch.testing.assert_close(out[rows], textbook(q[rows], keys[slots], values[slots], mask))


def test_a_tree_node_attends_to_its_sequence_and_its_mask(cache):
    keys, values, table = cache
    q = torch.randn(6, HEADS, DIM)
    tree = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]], dtype=torch.bool)
    out = extend(cache, q, [3, 3], tree_mask=tree.flatten())
    for i, (request, length) in enumerate([(2, 7), (0, 4)]):
        slots, rows = table[request, :length].long(), slice(3 * i, 3 * i + 3)
        mask = torch.cat([torch.ones(3, length - 3, dtype=torch.bool), tree[i]], dim=1)
        torch.testing.assert_close(out[rows], textbook(q[rows], keys[slots], values[slots], mask))


@pytest.mark.parametrize(
    "unsupported",
    [{"logit_cap": 30.0}, {"is_cross_attention": True}, {"is_causal": False}, {"sinks": torch.zeros(HEADS)}],
)
def test_attention_of_other_models_is_refused(cache, unsupported):
    with pytest.raises(NotImplementedError):
        extend(cache, torch.randn(5, HEADS, DIM), [3, 2], **unsupported)


def test_slots_are_written_and_read_back():
    table, requests = torch.zeros(3, 10, dtype=torch.int32), torch.tensor([2, 0])
    start, end, slots = torch.tensor([4, 0]), torch.tensor([7, 2]), torch.tensor([11, 12, 13, 21, 22])
    sgl_kernel.assign_req_to_token_pool_cpu(requests, table, start, end, slots, 10)
    assert table[2].tolist() == [0, 0, 0, 0, 11, 12, 13, 0, 0, 0] and table[0, :3].tolist() == [21, 22, 0]
    stored = torch.zeros(5, dtype=torch.int64)
    sgl_kernel.assign_extend_cache_locs_cpu(requests, table, start, end, stored, 10)
    assert stored.tolist() == slots.tolist()


def test_each_branch_has_its_own_slots_after_the_sequence():
    table, requests, lengths = torch.arange(40).view(2, 20), torch.tensor([1, 0]), torch.tensor([3, 5])
    slots = torch.zeros(12, dtype=torch.int64)
    sgl_kernel.assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, slots, 20, 2, 3)
    assert slots.tolist() == [*range(23, 29), *range(5, 11)]
    rows = sgl_kernel.build_draft_decode_metadata_cpu(table, requests, lengths, 2, 3, 20)
    assert rows.shape == (4, 20)
    assert rows[0, :6].tolist() == [20, 21, 22, 23, 24, 25] and rows[1, :6].tolist() == [20, 21, 22, 26, 27, 28]
    assert rows[3, :8].tolist() == [0, 1, 2, 3, 4, 8, 9, 10]


def test_overlapping_cache_rows_move_in_every_buffer():
    buffers = [torch.arange(12.0).view(6, 2), torch.arange(18).view(6, 3)]
    before = [b.clone() for b in buffers]
    pointers = torch.tensor([b.data_ptr() for b in buffers])
    strides = torch.tensor([b.stride(0) * b.element_size() for b in buffers])
    sgl_kernel.copy_all_layer_kv_cache_cpu(pointers, strides, torch.tensor([1, 2]), torch.tensor([2, 4]))
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer, old[[0, 2, 4, 3, 4, 5]])


def test_accepted_tokens_are_gathered():
    bonus = torch.zeros(2, dtype=torch.int64)
    sgl_kernel.fill_bonus_tokens_cpu(torch.tensor([7, 8, 9, 4, 5, 6]), torch.tensor([2, 3]), bonus, 3)
    assert bonus.tolist() == [8, 6]
    slots = torch.zeros(6, dtype=torch.int64)
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    sgl_kernel.fill_accept_out_cache_loc_cpu(accepted, torch.arange(50, 56), slots)
    assert slots.tolist() == [50, 52, 53, 0, 0, 0]


@pytest.mark.parametrize(("select", "expected"), [(None, [2, 3, 90, 5, 91]), ([1, 3], [2, 90, 3, 91, 5])])
def test_input_ids_are_rotated(select, expected):
    ids = torch.tensor([1, 2, 3, 4, 5])
    where = None if select is None else torch.tensor(select)
    sgl_kernel.rotate_input_ids_cpu(ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([[90], [91]]), where)
    assert ids.tolist() == expected


def build(parent_list, selected, lengths, topk, mode=1):
    requests, nodes = len(selected), len(selected[0]) + 1
    columns = [nodes + (length if mode == 0 else 0) for length in lengths]
    mask = torch.ones(sum(nodes * c for c in columns), dtype=torch.bool)
    positions = torch.empty(requests * nodes, dtype=torch.int64)
    links = torch.full((3, requests, nodes), -1)
    sgl_kernel.build_tree_kernel_efficient_cpu(torch.tensor(parent_list), torch.tensor(selected), torch.tensor(lengths),
                                               mask, positions, *links, topk, 3, nodes, mode)  # fmt: skip
    return mask, positions, *links


def test_a_chain_is_a_tree_of_one_branch():
    mask, positions, index, child, sibling = build([[-1, 0, 1]] * 2, [[0, 1, 2]] * 2, [5, 9], 1)
    assert torch.equal(mask.view(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool).tril())
    assert positions.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert child.tolist() == [[1, 2, 3, -1]] * 2 and (sibling == -1).all()


# Candidates 0 and 1 hang on the root, 2 and 3 on candidate 0, 4 and 5 on candidate 1.
BEAM = [[-1, 0, 1]]


@pytest.mark.parametrize("mode", [0, 1])
def test_a_tree_keeps_siblings_in_order_and_masks_all_but_ancestors(mode):
    mask, positions, _, child, sibling = build(BEAM, [[0, 1, 2, 3, 5]], [4], 2, mode)
    assert child.tolist() == [[1, 3, 5, -1, -1, -1]]
    assert sibling.tolist() == [[-1, 2, -1, 4, -1, -1]]
    assert positions.tolist() == [4, 5, 5, 6, 6, 6]
    sees = mask.view(6, -1)[:, -6:]
    assert [row.nonzero().flatten().tolist() for row in sees] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]]
    assert mask.view(6, -1)[:, :-6].all()


def test_a_node_without_a_selected_parent_is_unreachable():
    """With tied scores of 1.0 the child may be selected without its parent."""
    _, _, _, child, sibling = build(BEAM, [[0, 4]], [4], 2)
    assert child.tolist() == [[1, -1, -1]] and (sibling == -1).all()


def verify(child, sibling, tokens, best, depth):
    requests, nodes = len(tokens), len(tokens[0])
    predicts = torch.zeros(requests * nodes, dtype=torch.int32)
    accepted = torch.full((requests, depth + 1), -1, dtype=torch.int32)
    count = torch.empty(requests, dtype=torch.int32)
    index = torch.arange(requests * nodes).view(requests, nodes)
    sgl_kernel.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accepted, accept_token_num=count, candidates=torch.tensor(tokens),
        retrive_index=index, retrive_next_token=torch.tensor(child), retrive_next_sibling=torch.tensor(sibling),
        target_predict=torch.tensor(best),
    )  # fmt: skip
    return predicts.tolist(), accepted.tolist(), count.tolist()


def test_verification_follows_the_targets_choices():
    # The tree above: root → 1, 2; 1 → 3, 4; 2 → 5.  The first request takes 2 then 5, the second nothing.
    child, sibling = [[1, 3, 5, -1, -1, -1]] * 2, [[-1, 2, -1, 4, -1, -1]] * 2
    tokens = [[10, 11, 12, 13, 14, 15]] * 2
    best = [[12, 0, 15, 0, 0, 99], [77, 0, 0, 0, 0, 0]]
    predicts, accepted, count = verify(child, sibling, tokens, best, 2)
    assert accepted == [[0, 2, 5], [6, -1, -1]] and count == [2, 0]
    assert predicts == [12, 0, 15, 0, 0, 99, 77, 0, 0, 0, 0, 0]


def test_the_attention_is_registered_as_a_torch_operator():
    assert torch.ops.sgl_kernel.decode_attention_cpu is sgl_kernel.decode_attention_cpu
    assert torch.ops.sgl_kernel.extend_attention_cpu is sgl_kernel.extend_attention_cpu
