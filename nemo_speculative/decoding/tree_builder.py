"""Tree builders: draft tokens as a chain, a fixed tree (EAGLE-1), or where the draft is most confident (EAGLE-2)."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

import torch

from nemo_speculative.algorithms.common.drafting import DraftCursor
from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree, smallest_tree
from nemo_speculative.decoding.verify import Trees, Verifier, chains, trees
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


@dataclass(frozen=True)
class Chain:
    """A chain of ``num_steps`` draft tokens."""

    num_steps: int
    max_children: ClassVar[int] = 1

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        """The chains under the root at ``cursor``."""
        tokens, qs = [cursor.root], []
        for step in range(self.num_steps):
            if step:
                cursor.advance(tokens[-1], None)
            indices, q = verifier.children(cursor.logits, 1)
            tokens.append(cursor.ids[indices[..., 0]])
            if q is not None:
                qs.append(q)
        all_q = torch.cat((*qs, torch.zeros_like(qs[0])), dim=1) if qs else None
        return chains(torch.cat(tokens, dim=1), all_q, cursor.ids)


class _Level(NamedTuple):
    """One level of a static tree, and the i inner nodes, those that have children, of the level above."""

    inner: torch.Tensor
    """[i]: index of each inner node in its level."""
    inner_parents: torch.Tensor
    """[1, i]: index of its parent among the inner nodes one level higher."""
    inner_numbers: torch.Tensor
    """[i]: its number in the tree."""
    max_children: int
    selected: torch.Tensor
    """[w]: index of each node of this level among the ``max_children`` children of all inner nodes."""


@lru_cache(maxsize=16)
def _layout(paths: tuple[NodePath, ...], device: torch.device) -> tuple[torch.Tensor, list[_Level]]:
    """The parents [1, n] of a static tree's nodes, and its levels below the root."""
    nodes: list[NodePath] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number, tensor = {path: n for n, path in enumerate(nodes)}, partial(torch.tensor, device=device)
    levels: list[_Level] = []
    above: list[NodePath] = [()]
    inner_above: list[NodePath] = [()]
    for depth in range(1, len(nodes[-1]) + 1):
        level = [path for path in nodes if len(path) == depth]
        inner = [path for path in above if (*path, 0) in number]
        k = max(path[-1] for path in level) + 1
        levels.append(
            _Level(
                inner=tensor([above.index(path) for path in inner]),
                inner_parents=tensor([[inner_above.index(path[:-1]) for path in inner]]),
                inner_numbers=tensor([number[path] for path in inner]),
                max_children=k,
                selected=tensor([inner.index(path[:-1]) * k + path[-1] for path in level]),
            )
        )
        above, inner_above = level, inner
    return tensor([[-1, *(number[path[:-1]] for path in nodes[1:])]]), levels


@dataclass(frozen=True)
class StaticTree:
    """A tree of one fixed structure, as in EAGLE-1.

    Raises:
        UserError: a path is repeated, its parent or a preceding sibling is missing, or there are no paths.
    """

    paths: tuple[NodePath, ...] = MC_SIM_7B_63

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
        """The largest number of children of one node."""
        return max(path[-1] for path in self.paths) + 1

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        """The trees under the root at ``cursor``."""
        parents, levels = _layout(self.paths, cursor.root.device)
        tokens, all_q = [cursor.root], None
        for depth, level in enumerate(levels):
            if depth:
                cursor.advance(tokens[-1][:, level.inner], level.inner_parents)
            indices, q = verifier.children(cursor.logits, level.max_children)
            tokens.append(cursor.ids[indices.flatten(1)[:, level.selected]])
            if q is not None:
                all_q = q.new_zeros(len(q), parents.shape[1], q.shape[-1]) if all_q is None else all_q
                all_q[:, level.inner_numbers] = q
        return trees(torch.cat(tokens, dim=1), parents, len(levels), all_q, cursor.ids)


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

    def __post_init__(self) -> None:
        least, most = smallest_tree(self.topk), largest_tree(self.num_steps, self.topk)
        if self.num_steps < 1 or self.topk < 1 or not least <= self.num_draft_tokens <= most:
            raise UserError(
                f"num_draft_tokens is {self.num_draft_tokens}: a tree of num_steps={self.num_steps} and "
                f"topk={self.topk} has {least} to {most} nodes, the last sampled token included"
            )

    @property
    def max_children(self) -> int:
        """The largest number of children of one node."""
        return self.topk

    def build(self, cursor: DraftCursor, verifier: Verifier) -> Trees:
        """The trees under the root at ``cursor``."""
        root, device = cursor.root, cursor.root.device
        # Candidates are numbered across levels; the root is -1.
        expanded, score = torch.full_like(root, -1), torch.zeros(root.shape, device=device)
        tokens: list[torch.Tensor] = []
        parents: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        for level in range(self.num_steps):
            if level:
                score, best = _best(scores[-1], self.topk)
                expanded = best + sum(s.shape[1] for s in scores[:-1])
                cursor.advance(tokens[-1].gather(1, best), best // self.topk)
            log_q = cursor.logits.float().log_softmax(-1)
            indices, _ = verifier.children(log_q, self.topk)
            scores.append((score[..., None] + log_q.gather(-1, indices)).flatten(1))
            tokens.append(cursor.ids[indices].flatten(1))
            parents.append(expanded.repeat_interleave(self.topk, dim=1))
        all_tokens, all_parents, all_scores = (torch.cat(x, dim=1) for x in (tokens, parents, scores))

        # The best candidates as a tree.  No score exceeds its parent's, and the parent comes first among equals.
        best = _best(all_scores, self.num_draft_tokens - 1)[1].sort(dim=1).values
        node = torch.arange(self.num_draft_tokens, device=device).expand(len(root), -1)
        number = torch.zeros(len(root), all_scores.shape[1] + 1, dtype=torch.long, device=device)
        number.scatter_(1, best + 1, node[:, 1:])
        parent_nodes = number.gather(1, all_parents.gather(1, best) + 1)
        return trees(
            torch.cat((root, all_tokens.gather(1, best)), dim=1),
            torch.cat((node[:, :1] - 1, parent_nodes), dim=1),
            self.num_steps,
        )


TreeBuilder = Chain | StaticTree | DynamicTree


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
