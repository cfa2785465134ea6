"""Tree builders: draft tokens as a chain, a fixed tree (EAGLE-1), or where the draft is most confident (EAGLE-2)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree, smallest_tree
from nemo_speculative.decoding.trees import DraftProbabilities, Trees, chains, trees
from nemo_speculative.decoding.verify import Verifier
from nemo_speculative.utils.errors import UserError

NodePath = tuple[int, ...]

MC_SIM_7B_63: tuple[NodePath, ...] = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)  # fmt: skip
"""The published static tree of EAGLE-1: each node as the child numbers on the path to it."""


class DraftCursor(Protocol):
    """A draft at the newest level of a tree, w nodes wide; it starts at the root."""

    root: torch.Tensor
    """int64 [B, 1], the root's token."""
    ids: torch.Tensor
    """int64 [V_d], the target's ids of the draft vocabulary."""

    @property
    def logits(self) -> torch.Tensor:
        """[B, w, V_d], for the children of each node of the level."""
        ...

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """Runs the draft on the next level.

        Args:
            tokens: int64 [B, w'], the target's ids.
            parents: int64 [B or 1, w'], index of each one's parent in the previous level; None: it has one node.
        """
        ...


class TreeBuilder(Protocol):
    """A strategy for building trees of draft tokens."""

    prunes_by_score: ClassVar[bool]
    """Whether it drops candidates for their score."""

    @property
    def max_children(self) -> int:
        """The largest number of children of one node."""
        ...

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        """The trees under the root at ``cursor``."""
        ...


@dataclass(frozen=True)
class Chain:
    """A chain of ``num_steps`` draft tokens."""

    num_steps: int
    prunes_by_score: ClassVar[bool] = False
    max_children: ClassVar[int] = 1

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        tokens, q = [cursor.root], []
        for step in range(self.num_steps):
            if step:
                cursor.advance(tokens[-1], None)
            children = verifier.children(cursor.logits, 1)
            tokens.append(cursor.ids[children.indices[..., 0]])
            if children.q is not None:
                q.append(children.q)
        draft_probs = DraftProbabilities(torch.cat((*q, torch.zeros_like(q[0])), dim=1), cursor.ids) if q else None
        return chains(torch.cat(tokens, dim=1), draft_probs)


class _Level(NamedTuple):
    """One level of a static tree.  Inner nodes are those that have children."""

    selected: list[int]
    """Index of each of its nodes among the children of all inner nodes of the level above."""
    max_children: int
    """Number of children that are requested for each of those inner nodes."""
    parent_nodes: list[int]
    """Node numbers of those inner nodes."""
    inner: list[int]
    """Indices of this level's inner nodes."""
    inner_parents: torch.Tensor
    """int64 [1, inner]: index of their parents among the inner nodes of the level above."""


@lru_cache(maxsize=16)
def _layout(paths: tuple[NodePath, ...], device: torch.device) -> tuple[torch.Tensor, list[_Level]]:
    """The parents [1, n] of a static tree's nodes, and its levels."""
    nodes: list[NodePath] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number = {path: n for n, path in enumerate(nodes)}
    levels: list[_Level] = []
    above: list[NodePath] = [()]
    for depth in range(1, len(nodes[-1]) + 1):
        level = [path for path in nodes if len(path) == depth]
        inner = [path for path in level if (*path, 0) in number]
        max_children = max(path[-1] for path in level) + 1
        levels.append(
            _Level(
                selected=[above.index(path[:-1]) * max_children + path[-1] for path in level],
                max_children=max_children,
                parent_nodes=[number[path] for path in above],
                inner=[level.index(path) for path in inner],
                inner_parents=torch.tensor([[above.index(path[:-1]) for path in inner]], device=device),
            )
        )
        above = inner
    return torch.tensor([[-1, *(number[path[:-1]] for path in nodes[1:])]], device=device), levels


@dataclass(frozen=True)
class StaticTree:
    """A tree of one fixed structure, as in EAGLE-1.

    Raises:
        UserError: a path is repeated, its parent or a preceding sibling is missing, or there are no paths.
    """

    paths: tuple[NodePath, ...] = MC_SIM_7B_63
    prunes_by_score: ClassVar[bool] = False

    def __post_init__(self) -> None:
        known = {(), *self.paths}
        for path in self.paths or ((),):
            required = path[:-1] if path[-1:] in ((), (0,)) else (*path[:-1], path[-1] - 1)
            if not path or required not in known or self.paths.count(path) > 1:
                raise UserError(
                    f"the static tree {list(self.paths)} is invalid at {path}: expected each node once, as a path of "
                    "child numbers, e.g. (0, 1), together with its parent and its preceding siblings"
                )

    @property
    def max_children(self) -> int:
        return max(path[-1] for path in self.paths) + 1

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        parents, levels = _layout(self.paths, cursor.root.device)
        tokens, q = [cursor.root], []
        for depth, level in enumerate(levels):
            if depth:
                inner, inner_parents = levels[depth - 1][-2:]
                cursor.advance(tokens[-1][:, inner], inner_parents)
            children = verifier.children(cursor.logits, level.max_children)
            tokens.append(cursor.ids[children.indices.flatten(1)[:, level.selected]])
            q.append(children.q)
        draft_probs = _by_node(q, levels, parents.shape[1], cursor.ids) if verifier.samples_children else None
        return trees(torch.cat(tokens, dim=1), parents, len(levels), draft_probs)


def _by_node(q: list[Any], levels: list[_Level], num_nodes: int, ids: torch.Tensor) -> DraftProbabilities:
    out = q[0].new_zeros(len(q[0]), num_nodes, q[0].shape[-1])
    for level, of_level in zip(levels, q, strict=True):
        out[:, level.parent_nodes] = of_level
    return DraftProbabilities(out, ids)


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (2406.16858, section 4): expands the most probable candidates, then keeps the best of all candidates.

    A candidate's score is the sum of log q along its path.  Level 1 holds the ``topk`` likeliest tokens; each further
    level holds the ``topk`` likeliest children of the ``topk`` best candidates of the previous level.

    Raises:
        UserError: the numbers make no tree.
    """

    num_steps: int
    """Number of levels below the root."""
    topk: int
    num_draft_tokens: int
    """Nodes in the tree, including the root."""
    prunes_by_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least, most = smallest_tree(self.topk), largest_tree(self.num_steps, self.topk)
        if self.num_steps < 1 or self.topk < 1 or not least <= self.num_draft_tokens <= most:
            raise UserError(
                f"num_draft_tokens is {self.num_draft_tokens}: a tree of num_steps={self.num_steps} and "
                f"topk={self.topk} has {least} to {most} nodes, the last sampled token included"
            )

    @property
    def max_children(self) -> int:
        return self.topk

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        batch, device = len(cursor.root), cursor.root.device
        # Candidates are numbered across levels; the root is -1.
        expanded = torch.full((batch, 1), -1, device=device)
        score = torch.zeros(batch, 1, device=device)
        tokens: list[torch.Tensor] = []
        parents: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        for level in range(self.num_steps):
            if level:
                score, best = _best(scores[-1], self.topk)
                expanded = best + sum(s.shape[1] for s in scores[:-1])
                cursor.advance(tokens[-1].gather(1, best), best // self.topk)
            log_q = cursor.logits.float().log_softmax(-1)
            indices = verifier.children(log_q, self.topk).indices
            scores.append((score[..., None] + log_q.gather(-1, indices)).flatten(1))
            tokens.append(cursor.ids[indices].flatten(1))
            parents.append(expanded.repeat_interleave(self.topk, dim=1))
        return self._rerank(cursor.root, *(torch.cat(x, dim=1) for x in (tokens, parents, scores)))

    def _rerank(self, root: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> Trees:
        """The best candidates as a tree.  No score exceeds its parent's, and the parent comes first among equals."""
        best = _best(scores, self.num_draft_tokens - 1)[1].sort(dim=1).values
        node = torch.arange(self.num_draft_tokens, device=root.device).expand(len(root), -1)
        number = torch.zeros(len(root), scores.shape[1] + 1, dtype=torch.long, device=root.device)
        number.scatter_(1, best + 1, node[:, 1:])
        parent_nodes = number.gather(1, parents.gather(1, best) + 1)
        return trees(
            torch.cat((root, tokens.gather(1, best)), dim=1),
            torch.cat((node[:, :1] - 1, parent_nodes), dim=1),
            self.num_steps,
        )


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, the earlier first among equals: values and indices [B, k]."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def tree_builder_for(settings: SpeculativeSettings) -> TreeBuilder:
    """A chain for top-k 1, otherwise a dynamic tree, as SGLang builds them.

    Raises:
        UserError: the settings make no tree.
    """
    if settings.topk > 1:
        return DynamicTree(settings.num_steps, settings.topk, settings.num_draft_tokens)
    if settings.num_draft_tokens != settings.num_steps + 1 or settings.num_steps < 1:
        raise UserError(
            f"num_draft_tokens is {settings.num_draft_tokens}: a chain (topk=1) of num_steps={settings.num_steps} has "
            f"num_steps + 1 = {settings.num_steps + 1}; set that, or topk above 1"
        )
    return Chain(settings.num_steps)
