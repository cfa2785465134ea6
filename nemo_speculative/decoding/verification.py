"""Lossless verification: which draft tokens stay, so that the answer is distributed as the target's own.

A rule also says how a node's children are chosen, because each of them is exact for one way of choosing only.  Nothing
else attaches the distributions that :class:`Rejection` divides by to a tree.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from nemo_speculative.decoding.sampling import Sampling, draw, draw_distinct
from nemo_speculative.decoding.trees import Trees


class Children(NamedTuple):
    """The children of some nodes."""

    picks: torch.Tensor
    """int64 [B, w, k], rows of the draft vocabulary, in the order in which they are tried."""
    q: torch.Tensor | None
    """float32 [B, w, V_d], what they were drawn from; None: not left to chance."""


class Accepted(NamedTuple):
    """What a verification makes of one tree."""

    path: list[int]
    """The accepted nodes, the root first."""
    tokens: list[int]
    """What it emits: the tokens of the accepted draft nodes, and one of the target's."""


class Verifier(ABC):
    """How children are chosen, and which of them the target keeps."""

    draws: ClassVar[bool]
    """Whether children are drawn from the draft's distribution: then none may be dropped for what it is."""

    @abstractmethod
    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """One token of the target's each: logits [..., V] → int64 [...]."""

    @abstractmethod
    def children(self, logits: torch.Tensor, k: int) -> Children:
        """k children of every node: the draft's logits [B, w, V_d]."""

    @abstractmethod
    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        """The target's logits at every node, [B, n, V]."""


class _Following(Verifier):
    """Takes one token of the target's at every node and follows it for as long as a child is that token.

    Exact for children that depend on nothing but what came before them (2406.16858, section 3; there q = 1): whichever
    they are, what is emitted is the target's.  P(accept) = sum of p over the children, so the likeliest are best.
    """

    draws = False

    def children(self, logits: torch.Tensor, k: int) -> Children:
        return Children(logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices, None)

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        parents = trees.parents.expand_as(trees.tokens).tolist()
        rows = zip(trees.tokens.tolist(), parents, self.sample(logits).tolist(), strict=True)
        return [_follow(*row) for row in rows]


def _follow(tokens: Sequence[int], parents: Sequence[int], chosen: Sequence[int]) -> Accepted:
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    path = [0]
    while (node := child.get((path[-1], chosen[path[-1]]))) is not None:
        path.append(node)
    return Accepted(path, [chosen[node] for node in path])


class Greedy(_Following):
    """The target's likeliest token, always."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


@dataclass(frozen=True)
class TargetOnly(_Following):
    """Sampling from the target; SGLang's default, under this name."""

    sampling: Sampling
    generator: torch.Generator | None = None
    """Of the device that the target's logits are on; None: torch's own."""

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return draw(self.sampling.probabilities(logits), self.generator)


@dataclass(frozen=True)
class Rejection(Verifier):
    """Speculative sampling (2211.17192, algorithm 1), and over several children of a node (2402.14160, section 3).

    A child c drawn from q is accepted with probability min(1, p(c) / q(c)).  Otherwise p becomes norm(max(0, p - q)),
    and q is renormalised without c, since children are drawn without replacement.  After the last one, p is drawn from.
    """

    sampling: Sampling
    generator: torch.Generator | None = None
    draft_sampling: Sampling | None = None
    """What the draft's tokens are drawn with; None: as the target's."""

    draws = True

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return draw(self.sampling.probabilities(logits), self.generator)

    def children(self, logits: torch.Tensor, k: int) -> Children:
        q = (self.draft_sampling or self.sampling).probabilities(logits)
        return Children(draw_distinct(q, k, self.generator), q)

    def verify(self, trees: Trees, logits: torch.Tensor) -> list[Accepted]:
        if trees.drawn is None:  # n-grams: q is 1 at the draft token, and then the two rules are one
            return TargetOnly(self.sampling, self.generator).verify(trees, logits)
        all_gather = self.sampling.probabilities(logits)
        p, q = all_gather[:, 0], trees.drawn.at(0, logits.shape[-1])
        node = torch.zeros(len(p), 1, dtype=torch.long, device=p.device)
        accepted_at = []
        # In node order a node's children come after it, the first tried first: one pass walks all the paths.
        for child in range(1, trees.tokens.shape[1]):
            token = trees.tokens[:, child : child + 1]
            p_child, q_child = p.gather(1, token), q.gather(1, token)
            # Without any probability in q it was not drawn: there were fewer tokens than children.
            tried = (trees.parents[:, child : child + 1] == node) & (q_child > 0)
            accepted = tried & (self._uniform(p_child) * q_child < p_child)
            rejected = tried & ~accepted
            p = torch.where(rejected, _normalized((p - q).clamp(min=0), p), p)
            q = torch.where(rejected, _normalized(q.scatter(1, token, 0), q), q)
            node = node.masked_fill(accepted, child)
            p = torch.where(accepted, all_gather[:, child], p)
            q = torch.where(accepted, trees.drawn.at(child, logits.shape[-1]), q)
            accepted_at.append(accepted)
        return _verdicts(trees.tokens, accepted_at, draw(p, self.generator))

    def _uniform(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, device=like.device, generator=self.generator)


def _normalized(mass: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Each row over its sum; where nothing is left by rounding alone, ``otherwise``."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total, otherwise)


def _verdicts(tokens: torch.Tensor, accepted_at: list[torch.Tensor], last: torch.Tensor) -> list[Accepted]:
    accepted = torch.cat(accepted_at, dim=1).tolist() if accepted_at else [[] for _ in last]
    verdicts = []
    for row, taken, bonus in zip(tokens.tolist(), accepted, last.tolist(), strict=True):
        path = [0, *(node for node, yes in enumerate(taken, 1) if yes)]
        verdicts.append(Accepted(path, [*(row[node] for node in path[1:]), bonus]))
    return verdicts


def rule_for(sampling: Sampling, rejection: bool = False, generator: torch.Generator | None = None) -> Verifier:
    """Greedy at temperature 0; above it ``rejection`` chooses between the two sampling rules."""
    if sampling.temperature == 0:
        return Greedy()
    return (Rejection if rejection else TargetOnly)(sampling, generator)
