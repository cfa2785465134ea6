"""Verifiers by hand and against exact distributions: draft and target are tables of random logits for every path."""

from dataclasses import dataclass

import pytest
import torch

from nemo_speculative.decoding.tree_builder import Chain, DynamicTree, StaticTree
from nemo_speculative.decoding.verify import Greedy, Rejection, Sampling, TargetOnly, chains, trees, verifier_for
from tests.decoding.statistics import chi_square_p

DRAWS = 20_000
LEVEL = 1e-3
"""Significance level of the tests, whose seeds are fixed; a wrong verifier gets a p-value below CAUGHT."""
CAUGHT = 1e-9
V, TOKENS, DEPTH = 4, 3, 6
IDS = torch.tensor([0, 2, 3])
"""The draft vocabulary in target ids: it cannot propose token 1."""
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1))
TREE_BUILDERS = {"chain": Chain(3), "static": StaticTree(TREE), "dynamic": DynamicTree(3, 2, 6)}


def one_hot_logits(best, size=10):
    return torch.nn.functional.one_hot(torch.tensor(best), size).float() * 9


@pytest.mark.parametrize(
    "draft, best, emitted",
    [([], [7], [7]), ([1, 2], [1, 2, 3], [1, 2, 3]), ([1, 9], [1, 2, 3], [1, 2]), ([9, 2], [1, 2, 3], [1])],
)
@pytest.mark.parametrize("verifier", [Greedy(), TargetOnly(Sampling()), Rejection(Sampling())])
def test_a_chain_emits_the_matching_tokens_and_one_more(draft, best, emitted, verifier):
    accepted = verifier.verify(chains(torch.tensor([[0, *draft]])), one_hot_logits([best]))[0]
    assert accepted.tokens == emitted and accepted.path == list(range(len(emitted)))


def test_a_tree_follows_the_branch_that_agrees():
    #      0              the target's: 5 after the root, 8 after node 2, 4 after node 4
    #   1:3  2:5
    #  3:8  4:8 5:9
    grown = trees(torch.tensor([[0, 3, 5, 8, 8, 9]] * 2), torch.tensor([[-1, 0, 0, 1, 2, 2]]), levels=2)
    best = [[5, 8, 8, 1, 4, 6], [7, 8, 8, 1, 4, 6]]
    taken, refused = Greedy().verify(grown, one_hot_logits(best))
    assert taken == ([0, 2, 4], [5, 8, 4]) and refused == ([0], [7])
    assert Greedy().verify(grown.cut([1, 1]), one_hot_logits(best))[0] == ([0, 2], [5, 8]), "out of reach"


def test_temperature_0_is_greedy():
    assert isinstance(verifier_for(Sampling(0.0), rejection=True), Greedy)
    assert isinstance(verifier_for(Sampling(0.5)), TargetOnly)
    assert isinstance(verifier_for(Sampling(0.5), rejection=True), Rejection)


@dataclass
class Tables:
    """Logits of draft and target after every path of target tokens; a path is a number in base V + 1."""

    draft: torch.Tensor
    target: torch.Tensor

    @classmethod
    def random(cls, seed=0):
        chance, paths = torch.Generator().manual_seed(seed), (V + 1) ** DEPTH
        target = torch.randn(paths, V, generator=chance) * 1.5
        # Half right, half wrong: neither everything nor nothing is accepted.
        draft = target[:, IDS] * 0.5 + torch.randn(paths, len(IDS), generator=chance)
        return cls(draft, target)


def extended(paths, tokens):
    return paths * (V + 1) + tokens + 1


class TableCursor:
    """A draft that looks its logits up, after the paths int64 [B]."""

    def __init__(self, tables, paths):
        self.tables, self.ids = tables, IDS
        self.root, self._paths = torch.zeros(len(paths), 1, dtype=torch.long), paths[:, None]

    @property
    def logits(self):
        return self.tables.draft[self._paths]

    def advance(self, tokens, parents):
        above = self._paths if parents is None else self._paths.gather(1, parents.expand_as(tokens))
        self._paths = extended(above, tokens)


def target_logits(tables, grown, paths):
    """The target's logits [B, n, V] at every node."""
    parents = grown.parents.expand_as(grown.tokens)
    at = [paths]
    for node in range(1, grown.tokens.shape[1]):
        above = torch.stack(at, dim=1).gather(1, parents[:, node : node + 1])[:, 0]
        at.append(extended(above, grown.tokens[:, node]))
    return tables.target[torch.stack(at, dim=1)]


def decode(tables, tree_builder, verifier, draws=DRAWS):
    """``draws`` continuations of TOKENS tokens each, int64 [draws], as paths; and the acceptance length."""
    answers, emitted, verifications = [[] for _ in range(draws)], 0, 0
    while going := [i for i, answer in enumerate(answers) if len(answer) < TOKENS]:
        paths = torch.tensor([sum((t + 1) * (V + 1) ** (len(answers[i]) - 1 - n) for n, t in enumerate(answers[i]))
                              for i in going])  # fmt: skip
        grown = tree_builder.build(TableCursor(tables, paths), verifier)
        for i, accepted in zip(going, verifier.verify(grown, target_logits(tables, grown, paths)), strict=True):
            answers[i] += accepted.tokens
            emitted, verifications = emitted + len(accepted.tokens), verifications + 1
    numbers = [a * V * V + b * V + c for a, b, c, *_ in answers]
    return torch.tensor(numbers), emitted / verifications


def exact(tables, sampling):
    """The probability of each continuation, of the target alone."""
    result = []
    for number in range(V**TOKENS):
        path, p = torch.tensor(0), 1.0
        for token in (number // V**2, number // V % V, number % V):
            p *= float(sampling.probabilities(tables.target[path])[token])
            path = extended(path, token)
        result.append(p)
    return torch.tensor(result, dtype=torch.float64)


def p_value(verifier_class, tree_builder, sampling, seed=0, **settings):
    tables = Tables.random(seed)
    verifier = verifier_class(sampling, torch.Generator().manual_seed(seed), **settings)
    numbers, tau = decode(tables, tree_builder, verifier)
    return chi_square_p(torch.bincount(numbers, minlength=V**TOKENS), exact(tables, sampling)), tau


@pytest.mark.parametrize(
    "verifier, tree",
    [
        (TargetOnly, "chain"),
        (TargetOnly, "static"),
        (TargetOnly, "dynamic"),
        (Rejection, "chain"),
        (Rejection, "static"),
    ],
)
def test_sampled_answers_have_the_targets_distribution(verifier, tree):
    p, tau = p_value(verifier, TREE_BUILDERS[tree], Sampling(1.0))
    assert p > LEVEL
    assert 1.3 < tau < 3.5, "nothing accepted, or nothing rejected, proves little"


@pytest.mark.parametrize("sampling", [Sampling(0.6, top_p=0.8), Sampling(1.4, top_k=2)], ids=["top-p", "top-k"])
@pytest.mark.parametrize("verifier", [TargetOnly, Rejection])
def test_top_p_and_top_k_shape_the_distribution(verifier, sampling):
    """Fewer tokens than children may have a probability above 0."""
    assert p_value(verifier, TREE_BUILDERS["static"], sampling)[0] > LEVEL


@pytest.mark.parametrize("tree", ["chain", "static"])
def test_the_draft_may_have_its_own_sampling_settings(tree):
    own = {"draft_sampling": Sampling(0.5, top_k=2)}
    assert p_value(Rejection, TREE_BUILDERS[tree], Sampling(1.0), **own)[0] > LEVEL


def test_accepting_with_p_over_q_accepts_more_than_following_the_target():
    """P(accept) = sum min(p, q), and p(argmax q): the means over many first tokens, computed by hand."""
    tables = Tables.random()
    p = tables.target[0].softmax(-1)
    q = torch.zeros(V).scatter(0, IDS, tables.draft[0].softmax(-1))
    paths = torch.zeros(DRAWS, dtype=torch.long)
    for verifier_class, expected in ((TargetOnly, p[q.argmax()]), (Rejection, torch.minimum(p, q).sum())):
        verifier = verifier_class(Sampling(1.0), torch.Generator().manual_seed(1))
        grown = Chain(1).build(TableCursor(tables, paths), verifier)
        results = verifier.verify(grown, target_logits(tables, grown, paths))
        share = sum(len(accepted.path) == 2 for accepted in results) / DRAWS
        assert share == pytest.approx(float(expected), abs=4 * 0.5 / DRAWS**0.5)


class LikeliestChildren(Rejection):
    """Divides by q although the children were not drawn from it."""

    def children(self, logits, k):
        return logits.topk(k).indices, self.sampling.probabilities(logits)


class AlwaysAccepts(TargetOnly):
    """Always accepts the first child."""

    def verify(self, trees, logits):
        return super().verify(trees, logits.index_fill(1, torch.tensor([0]), 0.0) + self._bonus(trees, logits))

    def _bonus(self, trees, logits):
        favoured = torch.zeros_like(logits)
        favoured[:, 0].scatter_(1, trees.tokens[:, 1:2], 50.0)
        return favoured


@pytest.mark.parametrize("tree", ["chain", "static"])
@pytest.mark.parametrize("wrong", [LikeliestChildren, AlwaysAccepts])
def test_a_wrong_verifier_is_caught(wrong, tree):
    assert p_value(wrong, TREE_BUILDERS[tree], Sampling(1.0))[0] < CAUGHT


def keep_both(mass, otherwise):
    """Leaves p as it was after a rejection, instead of subtracting q."""
    return otherwise


def keep_q(mass, otherwise):
    """Leaves the rejected token in q, as if children were drawn with replacement; treats p correctly."""
    of_q = ((mass == otherwise) | (mass == 0)).all()
    return otherwise if of_q else mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)


@pytest.mark.parametrize("tree, wrong", [("chain", keep_both), ("static", keep_both), ("static", keep_q)])
def test_a_wrong_remainder_is_caught(monkeypatch, tree, wrong):
    monkeypatch.setattr("nemo_speculative.decoding.verify._normalize", wrong)
    assert p_value(Rejection, TREE_BUILDERS[tree], Sampling(1.0))[0] < CAUGHT
