"""Trees of draft tokens, sampling from the target, and the lossless verification of draft tokens.

A verifier also chooses a node's children, because each verification algorithm is exact for one way of choosing them
only.  Nothing else attaches the distributions that :class:`Rejection` divides by to a tree.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import one_hot

from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Trees:
    """The trees of B sequences, n nodes each; fields that are the same for all of them have one row.

    Node 0 is the root: the last sampled token, which the target has not read yet.  Parents come before children, and
    the children of a node are in the order in which they are tried.
    """

    tokens: torch.Tensor
    """int64 [B, n]."""
    parents: torch.Tensor
    """int64 [B or 1, n]; -1 for the root and for a node that was cut off."""
    depths: torch.Tensor
    """int64 [B or 1, n]: distance from the root, 0 at the root."""
    ancestors: torch.Tensor | None
    """bool [B or 1, n, n]: the nodes that each node attends to, itself included; None for chains: all before it."""
    levels: int
    """Depth of the deepest node."""
    q: torch.Tensor | None = None
    """float32 [B, n, V_d]: the distributions that the children of each node were drawn from; a leaf's is never read.
    None: they were not drawn at random."""
    ids: torch.Tensor | None = None
    """int64 [V_d], the target's ids of the draft vocabulary; read with ``q`` only."""

    def q_at(self, node: int, vocab_size: int) -> torch.Tensor:
        """The distribution at a node, over the target's vocabulary: float32 [B, V]."""
        assert self.q is not None and self.ids is not None
        q = self.q[:, node]
        return q.new_zeros(len(q), vocab_size).index_copy_(1, self.ids, q)

    def cut(self, max_depths: Sequence[int]) -> "Trees":
        """The same trees with the nodes of row b below depth ``max_depths[b]`` cut off."""
        if min(max_depths) >= self.levels:
            return self
        deepest = torch.tensor(max_depths, device=self.tokens.device)[:, None]
        return replace(self, parents=self.parents.masked_fill(self.depths > deepest, -1))


def chains(tokens: torch.Tensor, q: torch.Tensor | None = None, ids: torch.Tensor | None = None) -> Trees:
    """Chains: int64 [B, n], the root first."""
    depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return Trees(tokens, depths - 1, depths, None, tokens.shape[1] - 1, q, ids)


def trees(
    tokens: torch.Tensor, parents: torch.Tensor, levels: int, q: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> Trees:  # fmt: skip
    """Trees of any structure, at most ``levels`` deep: tokens int64 [B, n], parents int64 [B or 1, n] (root: -1)."""
    n = parents.shape[1]
    eye = torch.eye(n, dtype=torch.bool, device=parents.device)
    parent = parents.clamp(min=0)[..., None].expand(-1, -1, n)
    ancestors = eye.expand(len(parents), n, n)
    for _ in range(levels):
        ancestors = eye | ancestors.gather(1, parent)
    return Trees(tokens, parents, ancestors.sum(-1) - 1, ancestors, levels, q, ids)


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
        if self.top_p == 1 and self.top_k == 0:
            return p
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


class Accepted(NamedTuple):
    """The result of verifying one tree."""

    path: list[int]
    """The accepted nodes, the root first."""
    tokens: list[int]
    """The emitted tokens: those of the accepted draft nodes, and one of the target's."""


class Verifier(ABC):
    """Chooses the children of draft nodes, and accepts those that keep the answer distributed as the target's own.

    Samples a token of the target at every node, and accepts children while they equal those tokens.  That is exact for
    children that depend only on the tokens before them (2406.16858, section 3; there q = 1): whichever they are, the
    emitted tokens are the target's.  P(accept) = sum of p over the children, so the likeliest are best.
    """

    @abstractmethod
    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """One token of the target for each position: logits [..., V] → int64 [...]."""

    def children(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """k children of every node, from the draft's logits [B, w, V_d].

        Returns:
            int64 [B, w, k], indices in the draft vocabulary, in the order in which they are tried; float32 [B, w, V_d],
            the distributions they were drawn from, None if they were not drawn at random.
        """
        return (logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices), None

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        """The accepted path of each tree, from the target's logits at every node, [B, n, V]."""
        nodes = trees.tokens, trees.parents.expand_as(trees.tokens), self.sample(logits)
        results = []
        for tokens, parents, sampled in zip(*(x.tolist() for x in nodes), strict=True):
            child = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
            path = [0]
            while (node := child.get((path[-1], sampled[path[-1]]))) is not None:
                path.append(node)
            results.append(Accepted(path, [sampled[node] for node in path]))
        return results


class Greedy(Verifier):
    """Always the target's likeliest token."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


@dataclass(frozen=True)
class TargetOnly(Verifier):
    """Sampling from the target; SGLang's default, which has this name there too."""

    sampling: Sampling
    generator: torch.Generator | None = None
    """Generator on the device of the target's logits; None: torch's default generator."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return draw(self.sampling.probabilities(logits), self.generator)


@dataclass(frozen=True)
class SeededSampling(Verifier):
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
class Rejection(TargetOnly):
    """Speculative sampling (2211.17192, algorithm 1), and over several children of a node (2402.14160, section 3).

    A child c drawn from q is accepted with probability min(1, p(c) / q(c)).  Otherwise p becomes norm(max(0, p - q)),
    and q is renormalized without c, since children are drawn without replacement.  If no child is accepted, the emitted
    token is drawn from the remaining p.  No child may be dropped for its score.
    """

    draft_sampling: Sampling | None = None
    """Settings for drawing the draft's tokens; None: the target's."""

    def children(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        q = (self.draft_sampling or self.sampling).probabilities(logits)
        return draw_distinct(q, k, self.generator), q

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        if trees.q is None:  # n-grams: q is 1 at the draft token, and then both algorithms are the same
            return super().verify(trees, logits)
        p_at_nodes = self.sampling.probabilities(logits)
        p, q = p_at_nodes[:, 0], trees.q_at(0, logits.shape[-1])
        node = torch.zeros(len(p), 1, dtype=torch.long, device=p.device)
        # The root, and then whether each node is accepted: bool [B, 1] each.
        accepted_at = [node == 0]
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
            q = torch.where(accepted, trees.q_at(child, logits.shape[-1]), q)
            accepted_at.append(accepted)
        flags, bonus = torch.cat(accepted_at, dim=1).tolist(), draw(p, self.generator).tolist()
        results = []
        for tokens, row, last in zip(trees.tokens.tolist(), flags, bonus, strict=True):
            path = [i for i, flag in enumerate(row) if flag]
            results.append(Accepted(path, [*(tokens[i] for i in path[1:]), last]))
        return results


def _normalize(mass: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Each row divided by its sum; ``otherwise`` where rounding left a sum of 0."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total, otherwise)


def verifier_for(sampling: Sampling, rejection: bool = False, generator: torch.Generator | None = None) -> Verifier:
    """Greedy at temperature 0; otherwise sampling, by rejection or by following the target."""
    if sampling.temperature == 0:
        return Greedy()
    return (Rejection if rejection else TargetOnly)(sampling, generator)
