"""The unroll's attention, in each of its forms, against a loop over queries and heads in float64."""

import math

import pytest
import torch

from benchmarks.attention import DenseBlock
from nemo_speculative.algorithms.common import attention
from nemo_speculative.algorithms.common.attention import FLEX_BLOCK, block_for, flex_block, unroll_attention
from tests.observing import LargestTensor

CPU = torch.device("cpu")
DIM = 8
SMALL = {"PIECE_QUERIES": 8, "PIECE_SCORES": 160, "PIECE_ROUNDING": 4, "PIECE_COST": 24, "WIDE_GAP": 4}
SINGLE = {"PIECE_QUERIES": 1, "PIECE_ROUNDING": 1}


def flat_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def shuffled(index, seed=0):
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]


ROWS = flat_positions(5, 9, 3, 7, 16, 24, 1, 7)
MANY = flat_positions(*[3] * 30)
CASES = {
    "every query of several documents": (ROWS, torch.arange(72)),
    "a sparse subset": (ROWS, torch.tensor([1, 2, 6, 11, 13, 25, 30, 31, 41, 60, 63, 64, 71])),
    "unsorted": (ROWS, shuffled(torch.arange(0, 72, 3))),
    "unsorted, the last one many times": (ROWS, torch.cat((shuffled(torch.arange(3, 60, 2)), torch.full((9,), 11)))),
    "one query": (ROWS, torch.tensor([33])),
    "the first token of a document, many times": (ROWS, torch.full((12,), 24)),
    "one long document": (flat_positions(60), torch.arange(60)),
    "wide gaps": (flat_positions(90, 10), torch.tensor([0, 1, 30, 31, 32, 70, 88, 89, 99])),
    "many short documents": (MANY, torch.arange(2, 90, 3)),
}
SIZES = {"one piece": {}, "many pieces": SMALL}
HEADS = {"a head for each": (2, 2), "grouped": (6, 2), "one head of keys": (4, 1)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(attention, name, value)
    return request.param


def drawn(queries, keys, heads=(4, 2), own=0, dtype=torch.float64, seed=0):
    """q, keys and values, and a slot's own pairs; sharp enough that single keys matter."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads[0], DIM), *[(heads[1], keys, DIM)] * 2, *[(queries, heads[1], DIM)] * 2 * own]
    return [(1.5 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype) for shape in shapes]


def visibility(positions, index):
    """bool [n, m] by definition: the keys of a query's own document, up to itself."""
    document = (positions == 0).cumsum(0)
    keys = torch.arange(len(positions))
    return torch.stack([(document == document[t]) & (keys <= t) for t in index.tolist()])


def by_loop(positions, index, q, keys, values, *own):
    """out [n, H, d] and the logarithm of the normalizer [n, H] of one softmax over all that a query sees."""
    out, lse = [], []
    for n, t in enumerate(index.tolist()):
        seen = slice(t - int(positions[t]), t + 1)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // len(keys))
            k = torch.cat([keys[group, seen], *(x[n, group][None] for x in own[::2])])
            v = torch.cat([values[group, seen], *(x[n, group][None] for x in own[1::2])])
            scores = k @ q[n, head] / math.sqrt(DIM)
            lse.append(scores.logsumexp(0))
            out.append(scores.softmax(0) @ v)
    return torch.stack(out).view_as(q), torch.stack(lse).view(q.shape[:2])


def with_gradients(function, inputs):
    """The results of ``function``, and the gradients of a random combination of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    random = torch.Generator().manual_seed(9)
    parts = [(x * torch.randn(x.shape, generator=random, dtype=torch.float64)).sum().double() for x in found]
    return [*(x.detach() for x in found), *torch.autograd.grad(sum(parts), leaves, materialize_grads=True)]


def assert_same(found, expected, tolerance=1e-10):
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        assert (one.double() - two.double()).norm() <= tolerance * two.double().norm().clamp(min=1)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_pieces_equal_the_loop_in_value_normalizer_and_every_gradient(case, sizes, heads):
    positions, index = case
    inputs = drawn(len(index), len(positions), heads)
    expected = with_gradients(lambda *x: by_loop(positions, index, *x), inputs)
    assert_same(with_gradients(block_for(positions, index, CPU).attend, inputs), expected)


def test_the_dense_form_equals_the_loop(case):
    positions, index = case
    inputs = drawn(len(index), len(positions))
    expected = with_gradients(lambda *x: by_loop(positions, index, *x), inputs)
    # Its scores are float32.
    assert_same(with_gradients(DenseBlock(visibility(positions, index)).attend, inputs), expected, 1e-5)


def test_the_gradient_through_the_normalizer_alone(sizes):
    """The slots' own keys depend on the block through nothing else."""
    positions, index = CASES["unsorted"]
    inputs = drawn(len(index), len(positions))
    expected = with_gradients(lambda *x: by_loop(positions, index, *x)[1:], inputs)
    found = with_gradients(lambda *x: block_for(positions, index, CPU).attend(*x)[1:], inputs)
    assert_same(found, expected)
    assert expected[1].norm() > 1 and not found[3].any()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("form", ["pieces", "dense"])
def test_own_keys_join_in_one_softmax(case, sizes, form, steps):
    positions, index = case
    block = block_for(positions, index, CPU) if form == "pieces" else DenseBlock(visibility(positions, index))
    inputs = drawn(len(index), len(positions), own=steps)

    def ours(q, keys, values, *own):
        return (unroll_attention(q, (keys, values), block, list(zip(own[::2], own[1::2], strict=True))),)

    expected = with_gradients(lambda *x: by_loop(positions, index, *x)[:1], inputs)
    # Weights of float64 scores are joined in float32.
    assert_same(with_gradients(ours, inputs), expected, 1e-5)


def test_bfloat16_is_close_to_float32(case, sizes):
    positions, index = case
    block = block_for(positions, index, CPU)
    half = drawn(len(index), len(positions), dtype=torch.bfloat16)
    found = with_gradients(block.attend, half)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    expected = with_gradients(block.attend, [x.float() for x in half])
    for one, two in zip(found, expected, strict=True):
        assert (one.double() - two).norm() <= 0.02 * two.norm().clamp(min=1)


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    """Over 600 keys the normalizer's logarithm is about 6.4, where bfloat16 has steps of 0.03."""
    block = block_for(flat_positions(600), torch.arange(500, 600), CPU)
    half = [0.3 * x for x in drawn(100, 600, dtype=torch.bfloat16)]
    found, expected = block.attend(*half)[1], block.attend(*(x.float() for x in half))[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_the_gradients_of_many_pieces_add_up_in_float32():
    """A key that all queries see alike: 16 pieces, each after the first adds less than bfloat16 resolves."""
    queries, random = 2048, torch.Generator().manual_seed(0)
    block = block_for(torch.arange(queries), torch.arange(queries), CPU)
    assert len(block.layout) >= 16
    inputs = [torch.zeros(queries, 1, DIM), *torch.rand(2, 1, queries, DIM, generator=random)]
    half = [x.bfloat16().requires_grad_() for x in inputs]
    block.attend(*half)[0].float().sum().backward()
    # Every score is 0: query t spreads its gradient of 1 evenly over its t + 1 keys.
    expected = (1 / torch.arange(1, queries + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0)
    found = half[2].grad[0].double() / expected[:, None]
    assert (found - 1).abs().mean() < 2e-3


def scattered(seed):
    """A long batch of documents of every length, and some of its positions, in runs and alone."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.cat(
        (torch.randint(1, 40, (60,), generator=random), torch.randint(40, 3000, (4,), generator=random))
    )
    positions = flat_positions(*shuffled(lengths, seed).tolist())
    chance = torch.rand(len(positions) // 50 + 1, generator=random).repeat_interleave(50)[: len(positions)]
    taken = torch.rand(len(positions), generator=random) < chance.where(chance > 0.3, 0.01)
    index = shuffled(taken.nonzero()[:, 0], seed)
    return positions, torch.cat((index, index[-1:].expand(37)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [{}, SMALL, SINGLE], ids=["as shipped", "small", "single queries"])
def test_every_query_is_in_one_piece_and_sees_its_document_up_to_itself(seed, limits, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(attention, name, value)
    positions, index = scattered(seed)
    block = block_for(positions, index, CPU)
    assert torch.equal(block.order[block.inverse], torch.arange(len(index)))
    assert torch.equal(index[block.order], index[block.order].sort().values)
    rows = [n for piece in block.layout for n in range(piece.queries.start, piece.queries.stop)]
    assert rows == list(range(len(block.order)))
    queries = [block.order[piece.queries].unique() for piece in block.layout]
    assert len(torch.cat(queries)) == len(index)
    for piece in block.layout:
        t, width = index[block.order][piece.queries], piece.keys.stop - piece.keys.start
        assert_filled_up_and_no_more(len(t), width)
        seen = torch.ones(len(t), width, dtype=torch.bool)
        if piece.mask is not None:
            assert set(piece.mask.unique().tolist()) <= {float("-inf"), 0.0}
            seen[:, width - piece.mask.shape[1] :] = piece.mask == 0
        keys = torch.arange(piece.keys.start, piece.keys.stop)
        assert torch.equal(seen, (keys >= (t - positions[t])[:, None]) & (keys <= t[:, None]))


def assert_filled_up_and_no_more(rows, keys):
    step = attention.PIECE_ROUNDING
    assert rows % step == 0 and keys % step == 0 and rows <= attention.PIECE_QUERIES
    least = rows - step + 1
    assert least * (keys - step + 1) <= attention.PIECE_SCORES or least == 1


def test_how_pieces_are_cut():
    """A piece costs as much as ``PIECE_COST`` scores, so nearer queries share one."""
    count = lambda positions, index: len(block_for(positions, index, CPU).layout)  # noqa: E731
    assert count(MANY, torch.arange(90)) == 1
    assert count(flat_positions(4000), torch.tensor([100, 3900])) == 1
    few, many = torch.arange(1990, 2010), torch.cat((torch.arange(60, 100), torch.arange(3860, 3900)))
    assert count(flat_positions(4000), few) == 1
    assert count(flat_positions(2000, 2000), few) == 2
    assert count(flat_positions(4000), many) == 2
    assert count(flat_positions(2048), torch.arange(2048)) == 2048 / 128


@pytest.mark.parametrize("keys", [12_000, 40_000])
def test_over_many_keys_few_scores_are_computed_that_are_not_visible(keys):
    index = torch.arange(keys - 500, keys)
    pieces = block_for(flat_positions(keys), index, CPU).layout
    computed = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces)
    assert computed <= 1.1 * float((index + 1).sum())


def test_a_piece_whose_queries_see_all_of_its_keys_has_no_mask():
    (piece,) = block_for(flat_positions(50, 50), torch.tensor([81] * 5), CPU).layout
    assert piece.mask is None and piece.keys == slice(50, 82)


def test_no_tensor_has_the_size_of_the_square():
    """4096 queries over 4096 keys of one document, both heads at once."""
    n, heads = 4096, 2
    inputs = drawn(n, n, (heads, 1), dtype=torch.float32)
    with LargestTensor() as mode:
        with_gradients(block_for(flat_positions(n), torch.arange(n), CPU).attend, inputs)
    assert n * heads * DIM <= mode.elements <= heads * attention.PIECE_SCORES < n * n / 8


# The form for CUDA.


def flex_of(positions, index, device=CPU):
    order = index.argsort(stable=True)
    last = index[order]
    return flex_block(order, last - positions[last], last, len(positions), device)


@pytest.mark.parametrize("seed", range(3))
def test_the_block_mask_of_flex_is_the_visibility(seed):
    positions, index = scattered(seed)
    block = flex_of(positions, index)
    expected = visibility(positions, index[block.order])
    n, m = expected.shape
    sees = block.layout.mask_mod(None, None, torch.arange(n)[:, None], torch.arange(m))
    assert torch.equal(sees, expected)

    # Queries beyond the last are copies of it, keys beyond the last are seen by none.
    rows = torch.cat((expected, expected[-1:].expand(-n % FLEX_BLOCK, -1)))
    tiles = (
        torch.nn.functional.pad(rows, (0, -m % FLEX_BLOCK))
        .unflatten(1, (-1, FLEX_BLOCK))
        .unflatten(0, (-1, FLEX_BLOCK))
    )
    full = listed(block.layout.full_kv_num_blocks, block.layout.full_kv_indices)
    partial = listed(block.layout.kv_num_blocks, block.layout.kv_indices)
    assert torch.equal(full, tiles.all(3).all(1))
    assert not (partial & full).any()
    assert (tiles.any(3).any(1) <= (partial | full)).all()
    assert torch.equal(block.layout.to_dense()[0, 0].bool(), partial | full)


def listed(counts, indices):
    """bool [query blocks, key blocks]: the first indices of each row, as many as its count."""
    found = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count, order in zip(found, counts[0, 0].tolist(), indices[0, 0].long(), strict=True):
        row[order[:count]] = True
    return found


def test_flex_equals_the_dense_form(case):
    """Uncompiled, it has a forward pass on the CPU."""
    positions, index = case
    inputs = drawn(len(index), len(positions), dtype=torch.float32)
    with torch.no_grad():
        found = flex_of(positions, index).attend(*inputs)
        assert_same(found, DenseBlock(visibility(positions, index)).attend(*inputs), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel has a backward pass on CUDA alone")
@pytest.mark.parametrize("seed", range(2))
def test_compiled_flex_has_the_gradients_of_the_dense_form(seed):
    cuda = torch.device("cuda")
    positions, index = scattered(seed)
    random = torch.Generator().manual_seed(seed)
    shapes = [(len(index), 8, 64), (2, len(positions), 64), (2, len(positions), 64)]
    inputs = [torch.randn(shape, generator=random).to(cuda) for shape in shapes]
    weights = [torch.randn(shape, generator=random).to(cuda) for shape in (shapes[0], shapes[0][:2])]

    def gradients(block):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = block.attend(*leaves)
        loss = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        return [*(x.detach() for x in found), *torch.autograd.grad(loss, leaves)]

    dense = DenseBlock(visibility(positions, index).to(cuda))
    # A kernel may multiply float32 in TF32.
    assert_same(gradients(block_for(positions, index, cuda)), gradients(dense), 5e-3)
