import pytest
import torch

from nemo_speculative.algorithms.common.drafting import FIRST_CAPACITY, KVCache
from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.verify import trees
from tests.decoding.models import VOCAB_SIZE, prompts, small_target, tree_of

HEADS, DIM = 2, 3


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return small_target(tmp_path_factory.mktemp("small"))


class ListCache:
    """Reference: each row is a list of keys, without the scratch."""

    def __init__(self, rows):
        self.rows = [[] for _ in range(rows)]

    def append(self, keys):
        return [[*row, *new] for row, new in zip(self.rows, keys, strict=True)]


def numbered(rows, n, start):
    """Distinct keys [B, H, n, d]; values are the negated keys."""
    keys = torch.arange(start, start + rows * n).view(rows, 1, n, 1).expand(rows, HEADS, n, DIM).float().contiguous()
    return keys, [[float(x) for x in row] for row in keys[:, 0, :, 0].tolist()]


@pytest.mark.parametrize("alike", [False, True], ids=["ragged", "equal"])
@pytest.mark.parametrize("seed", range(3))
def test_the_cache_equals_a_list_of_keys_per_row(seed, alike):
    """Appends, tree paths, crops and removed rows in random order, beyond the first allocation."""
    random = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=random))

    rows, cache, oracle = 4, KVCache(4), ListCache(4)
    for step in range(60):
        n = pick(1, 9)
        keys, plain = numbered(rows, n, 1000 * step)
        after = oracle.append(plain)
        for layer in (0, 1):
            result = cache.append(layer, keys, -keys)
            for row, expected in enumerate(after):
                assert result[0][row, 0, : len(expected), 0].tolist() == expected
                assert torch.equal(result[1], -result[0])
        paths = [[i for i in range(n) if i == 0 or pick(0, 2)] for _ in range(rows)]
        paths = [paths[0]] * rows if alike else paths
        cache.keep(paths)
        oracle.rows = [
            [*row, *(new[i] for i in path)] for row, new, path in zip(oracle.rows, plain, paths, strict=True)
        ]
        if pick(0, 5) == 0:
            cut = [len(row) - (1 if alike else pick(0, 3)) for row in oracle.rows]
            cache.set_lengths(cut)
            oracle.rows = [row[:length] for row, length in zip(oracle.rows, cut, strict=True)]
        if step in (20, 40):
            chosen = [rows - 1, *range(rows - 2)]
            cache.select(chosen)
            oracle.rows, rows = [oracle.rows[i] for i in chosen], rows - 1
        assert cache.lengths == [len(row) for row in oracle.rows]
        assert cache.ragged == (len(set(cache.lengths)) > 1)
        assert not (alike and cache.ragged)
    assert cache.longest > FIRST_CAPACITY


@pytest.mark.parametrize("lengths", [[5, 5], [2, 7]], ids=["equal", "ragged"])
@pytest.mark.parametrize("shared", [True, False], ids=["one structure", "own structures"])
def test_visible_positions(lengths, shared):
    """The last n = 2 of the s = 4 newest positions are new: each entry is compared with a look-up."""
    cache = KVCache(2)
    cache.set_lengths(lengths)
    ancestors = torch.rand(1 if shared else 2, 2, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    result = cache.visible(ancestors).expand(2, -1, -1)
    assert result.shape == (2, 2, max(lengths) + 2)
    for row, length in enumerate(lengths):
        for query in range(2):
            for key in range(max(lengths) + 2):
                offset = key - (length - 2)
                known = ancestors[0 if shared else row, query]
                expected = offset < 0 or (offset < 4 and bool(known[offset]))
                assert bool(result[row, query, key]) == expected


def test_a_compacted_tree_equals_its_path(target):
    """Ragged prompts, a path through the static tree for each: states and stored keys as without the other nodes."""
    sequences = prompts(4, seed=1)
    model = CachedTarget(target, 4)
    model.prefill(sequences)
    parents = tree_of()
    tokens = torch.randint(0, VOCAB_SIZE, (4, len(parents)), generator=torch.Generator().manual_seed(0))
    paths = [[0], [0, 2, 8, 20], [0, 1, 5, 13, 21, 24], [0, 1, 7, 18]]
    result = model.read(trees(tokens, torch.tensor([parents]), 5)).at(paths)
    model.kv.keep(paths)
    for row, (prompt, path) in enumerate(zip(sequences, paths, strict=True)):
        whole = torch.tensor([prompt + tokens[row, path].tolist()])
        aux, hidden = target.forward(whole)
        assert result.counts[row] == len(path)
        torch.testing.assert_close(
            result.aux_hidden_states[row, : len(path)], aux[0, len(prompt) :], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            result.last_hidden_state[row, : len(path)], hidden[0, len(prompt) :], rtol=1e-4, atol=1e-4
        )
        fresh = CachedTarget(target, 1)
        fresh.prefill(whole.tolist())
        assert model.kv.lengths[row] == whole.shape[1]
        for layer, stored in fresh.kv._layers.items():
            for ours, theirs in zip(model.kv._layers[layer], stored, strict=True):
                end = whole.shape[1]
                torch.testing.assert_close(ours[row, :, :end], theirs[0, :, :end], rtol=1e-4, atol=1e-4)
