"""Sampling from the target and lossless verification of draft tokens.

A verifier also chooses a node's children, because each verification algorithm is exact for one way of choosing them
only.  Nothing else attaches the distributions that :class:`Rejection` divides by to a tree.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import one_hot

from nemo_speculative.decoding.trees import Trees
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: temperature, then top-k, then top-p, each renormalized, which is SGLang's order.

    Raises:
        UserError: a setting is out of range.
    """

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Limit to the smallest set of the likeliest tokens whose total probability reaches this."""
    top_k: int = 0
    """Limit to this number of the likeliest tokens; 0: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: expected a number of at least 0 (0 is greedy), e.g. 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: expected a share above 0 and at most 1 (1 is off)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: expected a number of tokens, or 0 for all of them")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of any float dtype → float32 [..., V] that sum to 1."""
        logits = logits.float()
        if self.temperature == 0:
            return one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # Subtracting the maximum keeps a tiny temperature from overflowing.
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        return p if self.top_p == 1 and self.top_k == 0 else self._filter(p)

    def _filter(self, p: torch.Tensor) -> torch.Tensor:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        if 0 < self.top_k < p.shape[-1]:
            ordered[..., self.top_k :] = 0
            ordered = ordered / ordered.sum(-1, keepdim=True)
        # A token stays while those before it sum to less than top_p, so the likeliest always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)
        return torch.zeros_like(p).scatter(-1, index, ordered / ordered.sum(-1, keepdim=True))


def draw(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One draw from each distribution: [..., V] → int64 [...]."""
    return _exponential_race(probabilities, generator).argmax(-1)


def draw_distinct(probabilities: torch.Tensor, k: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """k draws without replacement, in the order drawn: [..., V] → int64 [..., k].

    Where fewer than k tokens have a probability above 0, tokens of probability 0 follow them.
    """
    return _exponential_race(probabilities, generator).topk(k).indices


def _exponential_race(p: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """p_i / E_i with exponential E_i: sorted, these are in the order of successive draws without replacement."""
    exponential = torch.empty_like(p).exponential_(generator=generator)
    return p / exponential.clamp_min(torch.finfo(p.dtype).tiny)


def inverse_transform(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: [..., V] and float64 [...] in [0, 1) → int64 [...].

    The first token whose cumulative probability exceeds the number, so never a token of probability 0.
    """
    cumulative = probabilities.double().cumsum(-1)
    index = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
    return index.clamp(max=probabilities.shape[-1] - 1)


class Children(NamedTuple):
    """The children of w nodes of each sequence."""

    indices: torch.Tensor
    """int64 [B, w, k], into the draft vocabulary, in the order in which they are tried."""
    q: torch.Tensor | None
    """float32 [B, w, V_d], the distributions they were drawn from; None: they were not drawn at random."""


class Accepted(NamedTuple):
    """The result of verifying one tree."""

    path: list[int]
    """The accepted nodes, the root first."""
    tokens: list[int]
    """The emitted tokens: those of the accepted draft nodes, and one of the target's."""


class Verifier(ABC):
    """Chooses the children of draft nodes, and accepts those that keep the answer distributed as the target's own."""

    samples_children: ClassVar[bool]
    """Whether children are drawn from the draft's distribution; none may then be dropped for its score."""

    @abstractmethod
    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """One token of the target for each position: logits [..., V] → int64 [...]."""

    @abstractmethod
    def children(self, logits: torch.Tensor, k: int) -> Children:
        """k children of every node, from the draft's logits [B, w, V_d]."""

    @abstractmethod
    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        """The accepted path of each tree, from the target's logits at every node, [B, n, V]."""


class _FollowTarget(Verifier):
    """Samples a token of the target at every node, and accepts children while they equal those tokens.

    Exact for children that depend only on the tokens before them (2406.16858, section 3; there q = 1): whichever they
    are, the emitted tokens are the target's.  P(accept) = sum of p over the children, so the likeliest are best.
    """

    samples_children = False

    def children(self, logits: torch.Tensor, k: int) -> Children:
        return Children(logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices, None)

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        sampled = self.sample(logits).tolist()
        if trees.tokens.shape[1] == 1:  # plain decoding
            return [Accepted([0], tokens) for tokens in sampled]
        parents = trees.parents.expand_as(trees.tokens).tolist()
        return [_follow(*row) for row in zip(trees.tokens.tolist(), parents, sampled, strict=True)]


def _follow(tokens: Sequence[int], parents: Sequence[int], sampled: Sequence[int]) -> Accepted:
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    path = [0]
    while (node := child.get((path[-1], sampled[path[-1]]))) is not None:
        path.append(node)
    return Accepted(path, [sampled[node] for node in path])


class Greedy(_FollowTarget):
    """Always the target's likeliest token."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


@dataclass(frozen=True)
class TargetOnly(_FollowTarget):
    """Sampling from the target; SGLang's default, which has this name there too."""

    sampling: Sampling
    generator: torch.Generator | None = None
    """Generator on the device of the target's logits; None: torch's default generator."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return draw(self.sampling.probabilities(logits), self.generator)


@dataclass(frozen=True)
class SeededSampling(_FollowTarget):
    """Sampling from the target with one generator per sequence.

    Without draft tokens an answer does not depend on the rest of its batch; with them, the widest tree of the batch
    determines how many numbers each step draws.
    """

    sampling: Sampling
    generators: Sequence[random.Random]
    """One for each of the B sequences."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        positions = math.prod(logits.shape[1:-1])
        uniform = [[generator.random() for _ in range(positions)] for generator in self.generators]
        numbers = torch.tensor(uniform, dtype=torch.float64, device=logits.device).view(logits.shape[:-1])
        return inverse_transform(self.sampling.probabilities(logits), numbers)


@dataclass(frozen=True)
class Rejection(Verifier):
    """Speculative sampling (2211.17192, algorithm 1), and over several children of a node (2402.14160, section 3).

    A child c drawn from q is accepted with probability min(1, p(c) / q(c)).  Otherwise p becomes norm(max(0, p - q)),
    and q is renormalized without c, since children are drawn without replacement.  If no child is accepted, the emitted
    token is drawn from the remaining p.
    """

    sampling: Sampling
    generator: torch.Generator | None = None
    draft_sampling: Sampling | None = None
    """Settings for drawing the draft's tokens; None: the target's."""

    samples_children = True

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return draw(self.sampling.probabilities(logits), self.generator)

    def children(self, logits: torch.Tensor, k: int) -> Children:
        q = (self.draft_sampling or self.sampling).probabilities(logits)
        return Children(draw_distinct(q, k, self.generator), q)

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        if trees.draft_probs is None:  # n-grams: q is 1 at the draft token, and then both algorithms are the same
            return TargetOnly(self.sampling, self.generator).verify(trees, logits)
        p_at_nodes = self.sampling.probabilities(logits)
        p, q = p_at_nodes[:, 0], trees.draft_probs.at(0, logits.shape[-1])
        node = torch.zeros(len(p), 1, dtype=torch.long, device=p.device)
        accepted_at = []
        # In node order a node's children come after it, the first tried first: one pass walks all the paths.
        for child in range(1, trees.tokens.shape[1]):
            token = trees.tokens[:, child : child + 1]
            p_child, q_child = p.gather(1, token), q.gather(1, token)
            # q = 0: the child was not drawn, because fewer tokens than children have a probability.
            tried = (trees.parents[:, child : child + 1] == node) & (q_child > 0)
            uniform = torch.rand(p_child.shape, device=p.device, generator=self.generator)
            accepted = tried & (uniform * q_child < p_child)
            rejected = tried & ~accepted
            p = torch.where(rejected, _normalize((p - q).clamp(min=0), p), p)
            q = torch.where(rejected, _normalize(q.scatter(1, token, 0), q), q)
            node = node.masked_fill(accepted, child)
            p = torch.where(accepted, p_at_nodes[:, child], p)
            q = torch.where(accepted, trees.draft_probs.at(child, logits.shape[-1]), q)
            accepted_at.append(accepted)
        return _paths(trees.tokens, accepted_at, draw(p, self.generator))


def _normalize(mass: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Each row divided by its sum; ``otherwise`` where rounding left a sum of 0."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total, otherwise)


def _paths(tokens: torch.Tensor, accepted_at: list[torch.Tensor], last: torch.Tensor) -> list[Accepted]:
    """Accepted draft tokens [B, n] by node, each row followed by its last token [B]."""
    accepted = torch.cat(accepted_at, dim=1).tolist() if accepted_at else [[] for _ in last]
    results = []
    for row, flags, bonus in zip(tokens.tolist(), accepted, last.tolist(), strict=True):
        path = [0, *(node for node, flag in enumerate(flags, 1) if flag)]
        results.append(Accepted(path, [*(row[node] for node in path[1:]), bonus]))
    return results


def verifier_for(sampling: Sampling, rejection: bool = False, generator: torch.Generator | None = None) -> Verifier:
    """Greedy at temperature 0; otherwise sampling, by rejection or by following the target."""
    if sampling.temperature == 0:
        return Greedy()
    return (Rejection if rejection else TargetOnly)(sampling, generator)
