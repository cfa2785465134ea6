"""Trees of a draft that is a table: its logits depend only on the path, so a reference can look them up."""

import random

import pytest
import torch

from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree
from nemo_speculative.decoding.tree_builder import MC_SIM_7B_63, Chain, DynamicTree, StaticTree, tree_builder_for
from nemo_speculative.decoding.verify import Greedy, Rejection, Sampling, chains, trees
from nemo_speculative.utils.errors import UserError
from tests.decoding.models import tree_of

IDS = torch.tensor([2, 3, 5, 7, 11, 13])
"""The draft vocabulary in target ids."""


def table(seed: int, path: tuple[int, ...]) -> torch.Tensor:
    """The draft's logits after a path of its tokens; sometimes it is certain, and log q is 0."""
    chance = random.Random(repr((seed, path)))
    logits = [chance.gauss(0, 2) for _ in IDS]
    if chance.random() < 0.25:
        logits[chance.randrange(len(IDS))] = 1000.0
    return torch.tensor(logits)


class TableCursor:
    """A draft with one table per tree."""

    def __init__(self, seeds):
        self.seeds, self.ids, self.runs = seeds, IDS, 0
        self.root = torch.full((len(seeds), 1), 99)
        self._paths = [[()] for _ in seeds]

    @property
    def logits(self):
        rows = zip(self.seeds, self._paths, strict=True)
        return torch.stack([torch.stack([table(seed, path) for path in paths]) for seed, paths in rows])

    def advance(self, tokens, parents):
        self.runs += 1
        chosen = torch.zeros_like(tokens) if parents is None else parents.expand(len(tokens), -1)
        self._paths = [
            [(*paths[p], int((t == IDS).nonzero())) for t, p in zip(row, at, strict=True)]
            for paths, row, at in zip(self._paths, tokens, chosen.tolist(), strict=True)
        ]


def paths_of(grown, row):
    """The nodes of a tree as paths of the draft's own token numbers, in node order."""
    tokens = grown.tokens[row].tolist()
    result = [()]
    for node, parent in list(enumerate(grown.parents.expand_as(grown.tokens)[row].tolist()))[1:]:
        assert 0 <= parent < node, "parents come before children"
        result.append((*result[parent], IDS.tolist().index(tokens[node])))
    return result[1:]


def best_first(seed, path, k):
    """The k likeliest children with their log q."""
    log_q = table(seed, path).log_softmax(0)
    return [(i, log_q[i]) for i in sorted(range(len(IDS)), key=lambda i: -log_q[i])[:k]]


def eagle2(seed, num_steps, topk, num_draft_tokens):
    """EAGLE-2's expansion and reranking on a dictionary; equal scores are ordered by depth, then by position."""
    scores: dict[tuple[int, ...], torch.Tensor] = {}
    cursor = [()]
    for _ in range(num_steps):
        level = {
            (*path, token): scores.get(path, 0.0) + log_q
            for path in cursor
            for token, log_q in best_first(seed, path, topk)
        }
        scores |= level
        cursor = sorted(level, key=lambda path: -level[path])[:topk]
    return sorted(scores, key=lambda path: -scores[path])[: num_draft_tokens - 1]


@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_a_chain_takes_the_likeliest_token_each_time(num_steps):
    cursor = TableCursor([1, 2])
    grown = Chain(num_steps).build(cursor, Greedy())
    for row, seed in enumerate((1, 2)):
        expected = ()
        for _ in range(num_steps):
            expected = (*expected, best_first(seed, expected, 1)[0][0])
        assert paths_of(grown, row) == [expected[: n + 1] for n in range(num_steps)]
    assert grown.levels == num_steps and grown.depths.tolist() == [list(range(num_steps + 1))]
    assert cursor.runs == num_steps - 1, "the draft has run on the root already"


@pytest.mark.parametrize(
    "num_steps, topk, num_draft_tokens",
    [(1, 3, 4), (1, 4, 5), (2, 2, 7), (3, 4, 8), (3, 4, 37), (5, 2, 6), (6, 6, 40), (4, 1, 5), (4, 5, 6)],
)
def test_a_dynamic_tree_equals_eagle2s(num_steps, topk, num_draft_tokens):
    seeds = list(range(12))
    cursor = TableCursor(seeds)
    grown = DynamicTree(num_steps, topk, num_draft_tokens).build(cursor, Greedy())
    assert grown.tokens.shape == (12, num_draft_tokens) and cursor.runs == num_steps - 1
    for row, seed in enumerate(seeds):
        result = paths_of(grown, row)
        assert set(result) == set(eagle2(seed, num_steps, topk, num_draft_tokens))
        assert grown.depths[row].tolist() == [0, *(len(path) for path in result)]


def test_topk_1_is_the_chain():
    dynamic, chain = (
        DynamicTree(4, 1, 5).build(TableCursor([3]), Greedy()),
        Chain(4).build(TableCursor([3]), Greedy()),
    )
    assert dynamic.tokens.tolist() == chain.tokens.tolist()
    assert dynamic.parents.tolist() == chain.parents.tolist()


@pytest.mark.parametrize("paths", [MC_SIM_7B_63, ((0,),), ((0,), (0, 0), (0, 1), (0, 1, 0)), ((0,), (1,), (1, 0))])
def test_a_static_tree_has_its_structure_and_the_likeliest_tokens(paths):
    cursor, seeds = TableCursor([4, 5]), (4, 5)
    grown = StaticTree(paths).build(cursor, Greedy())
    assert grown.parents.tolist() == [tree_of(paths)]
    assert cursor.runs == max(map(len, paths)) - 1
    for row, seed in enumerate(seeds):
        expected = []
        for path in sorted(paths, key=lambda path: (len(path), path)):
            tokens = ()
            for child in path:
                tokens = (*tokens, best_first(seed, tokens, child + 1)[child][0])
            expected.append(tokens)
        assert paths_of(grown, row) == expected


def test_the_published_static_tree():
    assert len(set(MC_SIM_7B_63)) == 25, "26 nodes with the root"
    assert [sum(len(path) == depth for path in MC_SIM_7B_63) for depth in range(1, 6)] == [4, 8, 8, 3, 2]
    assert StaticTree().max_children == 4


@pytest.mark.parametrize(
    "tree_builder", [Chain(3), StaticTree(((0,), (1,), (1, 0), (1, 1), (0, 0)))], ids=["chain", "tree"]
)
def test_drawn_children_come_with_their_distributions(tree_builder):
    """At every inner node q is that node's own distribution, placed at the target's ids; its children are distinct."""
    sampling = Sampling(1.3)
    grown = tree_builder.build(TableCursor([7, 8]), Rejection(sampling, torch.Generator().manual_seed(0)))
    parents = grown.parents[0].tolist()
    for row, seed in enumerate((7, 8)):
        paths = [(), *paths_of(grown, row)]
        for node in set(parents) - {-1}:
            expected = torch.zeros(20).scatter(0, IDS, (table(seed, paths[node]) / 1.3).softmax(0))
            torch.testing.assert_close(grown.q_at(node, 20)[row], expected)
            children = [paths[i] for i, parent in enumerate(parents) if parent == node]
            assert len(set(children)) == len(children)


def test_ancestors_and_cuts_by_hand():
    #      0
    #    1   2
    #   3   4 5
    #         6
    parents = torch.tensor([[-1, 0, 0, 1, 2, 2, 5]])
    expected = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 2, 4}, {0, 2, 5}, {0, 2, 5, 6}]
    grown = trees(torch.arange(14).view(2, 7), parents, levels=3)
    assert [set(row.nonzero().flatten().tolist()) for row in grown.ancestors[0]] == expected
    assert grown.depths.tolist() == [[0, 1, 1, 2, 2, 2, 3]]
    assert grown.cut([3, 5]) is grown
    assert grown.cut([1, 2]).parents.tolist() == [[-1, 0, 0, -1, -1, -1, -1], [-1, 0, 0, 1, 2, 2, -1]]
    assert chains(torch.zeros(2, 4, dtype=torch.long)).cut([0, 2]).parents.tolist() == [[-1] * 4, [-1, 0, 1, -1]]


def test_settings_become_the_trees_of_sglang():
    assert tree_builder_for(SpeculativeSettings(5, 1, 6)) == Chain(5)
    assert tree_builder_for(SpeculativeSettings(3, 4, 8)) == DynamicTree(3, 4, 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ((5, 1, 5), "num_draft_tokens is 5: a chain (topk=1) of num_steps=5 has num_steps + 1 = 6"),
        ((5, 4, 1), "num_draft_tokens is 1: a tree of num_steps=5 and topk=4 has 5 to 69 nodes"),
        ((2, 2, 8), "num_draft_tokens is 8: a tree of num_steps=2 and topk=2 has 3 to 7 nodes"),
        ((0, 2, 2), "num_steps=0"),
        ((0, 1, 1), "num_steps=0"),
    ],
)
def test_settings_that_make_no_tree_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        tree_builder_for(SpeculativeSettings(*settings))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert largest_tree(5, 4) == 69


@pytest.mark.parametrize(
    "paths", [(), ((),), ((1,),), ((0,), (0, 1)), ((0,), (1, 0)), ((0,), (0, 0, 0)), ((-1,),), ((0,), (0,))]
)
def test_a_static_tree_with_a_gap_is_refused(paths):
    with pytest.raises(UserError, match="static tree") as error:
        StaticTree(paths)
    assert "\n" not in str(error.value)
