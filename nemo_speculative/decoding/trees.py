"""Trees of draft tokens, for several sequences at once.

Node 0 is the root: the last sampled token, which the target has not read yet.  Parents come before children, and the
children of a node are in the order in which they are tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class DraftProbabilities:
    """The distributions that the children of each node were drawn from."""

    q: torch.Tensor
    """float32 [B, n, V_d]; a leaf's is never read."""
    ids: torch.Tensor
    """int64 [V_d], the target's ids of the draft vocabulary."""

    def at(self, node: int, vocab_size: int) -> torch.Tensor:
        """The distribution at a node, over the target's vocabulary: float32 [B, V]."""
        q = self.q[:, node]
        return q.new_zeros(len(q), vocab_size).index_copy_(1, self.ids, q)


@dataclass(frozen=True)
class Trees:
    """The trees of B sequences, n nodes each; fields that are the same for all of them have one row."""

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
    draft_probs: DraftProbabilities | None = None
    """Distributions of the draft tokens; None: these were not drawn at random."""

    def cut(self, max_depths: Sequence[int]) -> "Trees":
        """The same trees with the nodes of row b below depth ``max_depths[b]`` cut off."""
        if min(max_depths) >= self.levels:
            return self
        deepest = torch.tensor(max_depths, device=self.tokens.device)[:, None]
        return replace(self, parents=self.parents.masked_fill(self.depths > deepest, -1))


def chains(tokens: torch.Tensor, draft_probs: DraftProbabilities | None = None) -> Trees:
    """Chains: int64 [B, n], the root first."""
    parents, depths = _chain(tokens.shape[1], tokens.device)
    return Trees(tokens, parents, depths, None, tokens.shape[1] - 1, draft_probs)


@lru_cache(maxsize=64)
def _chain(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    depths = torch.arange(n, device=device)[None]
    return depths - 1, depths


def trees(
    tokens: torch.Tensor, parents: torch.Tensor, levels: int, draft_probs: DraftProbabilities | None = None
) -> Trees:
    """Trees of any structure, at most ``levels`` deep: tokens int64 [B, n], parents int64 [B or 1, n] (root: -1)."""
    ancestors = ancestors_of(parents, levels)
    return Trees(tokens, parents, ancestors.sum(-1) - 1, ancestors, levels, draft_probs)


def ancestors_of(parents: torch.Tensor, levels: int) -> torch.Tensor:
    """The ancestors of each node, itself included: parents int64 [B, n], at most ``levels`` deep → bool [B, n, n]."""
    n = parents.shape[1]
    eye = torch.eye(n, dtype=torch.bool, device=parents.device)
    parent = parents.clamp(min=0)[..., None].expand(-1, -1, n)
    ancestors = eye.expand(len(parents), n, n)
    for _ in range(levels):
        ancestors = eye | ancestors.gather(1, parent)
    return ancestors
