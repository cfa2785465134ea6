"""How a draft grows a tree: as a chain, in a fixed structure (EAGLE-1), or where it is surest (EAGLE-2)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree, smallest_tree
from nemo_speculative.decoding.trees import Drawn, Trees, chains, trees
from nemo_speculative.decoding.verification import Verifier
from nemo_speculative.utils.errors import UserError

NodePath = tuple[int, ...]

MC_SIM_7B_63: tuple[NodePath, ...] = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)  # fmt: skip
"""The published static tree of EAGLE-1: each node as the child numbers that lead to it."""


class DraftCursor(Protocol):
    """A draft at the newest level of a tree, w nodes wide; it starts at the root."""

    root: torch.Tensor
    """int64 [B, 1], the root's token."""
    ids: torch.Tensor
    """int64 [V_d], the target's ids of the draft vocabulary."""

    @property
    def logits(self) -> torch.Tensor:
        """[B, w, V_d]."""
        ...

    def descend(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """Runs the draft on the next level.

        Args:
            tokens: int64 [B, w'], the target's ids.
            parents: int64 [B or 1, w'], each one's place in the level before; None: it is the only one.
        """
        ...


class TreeBuilder(Protocol):
    """A way to grow trees."""

    ranks: ClassVar[bool]
    """Whether it drops candidates for their score."""

    @property
    def widest(self) -> int:
        """Children of one node, at most."""
        ...

    def grow(self, frontier: DraftCursor, rule: Verifier) -> Trees:
        """The trees below ``frontier``."""
        ...


@dataclass(frozen=True)
class Chain:
    """``num_steps`` draft tokens, one behind the other."""

    num_steps: int
    ranks: ClassVar[bool] = False
    widest: ClassVar[int] = 1

    def grow(self, frontier: DraftCursor, rule: Verifier) -> Trees:
        tokens, q = [frontier.root], []
        for step in range(self.num_steps):
            if step:
                frontier.descend(tokens[-1], None)
            children = rule.children(frontier.logits, 1)
            tokens.append(frontier.ids[children.picks[..., 0]])
            if children.q is not None:
                q.append(children.q)
        drawn = Drawn(torch.cat((*q, torch.zeros_like(q[0])), dim=1), frontier.ids) if q else None
        return chains(torch.cat(tokens, dim=1), drawn)


class _Level(NamedTuple):
    """One level of a static tree.  Inner nodes are those that have children."""

    picked: list[int]
    """Its nodes among the children of all inner nodes above, counted through."""
    widest: int
    """How many children of each of those are asked for."""
    parent_nodes: list[int]
    """Those as nodes of the tree."""
    inner: list[int]
    """Which of its nodes are inner nodes."""
    inner_parents: torch.Tensor
    """int64 [1, inner]: the place of their parents among the inner nodes above."""


@lru_cache(maxsize=16)
def _layout(paths: tuple[NodePath, ...], device: torch.device) -> tuple[torch.Tensor, list[_Level]]:
    """The parents [1, n] of a static tree's nodes, and its levels."""
    nodes: list[NodePath] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number = {path: n for n, path in enumerate(nodes)}
    levels: list[_Level] = []
    above: list[NodePath] = [()]
    for depth in range(1, len(nodes[-1]) + 1):
        here = [path for path in nodes if len(path) == depth]
        inner = [path for path in here if (*path, 0) in number]
        widest = max(path[-1] for path in here) + 1
        levels.append(
            _Level(
                picked=[above.index(path[:-1]) * widest + path[-1] for path in here],
                widest=widest,
                parent_nodes=[number[path] for path in above],
                inner=[here.index(path) for path in inner],
                inner_parents=torch.tensor([[above.index(path[:-1]) for path in inner]], device=device),
            )
        )
        above = inner
    return torch.tensor([[-1, *(number[path[:-1]] for path in nodes[1:])]], device=device), levels


@dataclass(frozen=True)
class StaticTree:
    """The same structure every time, as EAGLE-1 has it.

    Raises:
        UserError: a path lacks its parent or an elder sibling, or comes twice, or there is none.
    """

    paths: tuple[NodePath, ...] = MC_SIM_7B_63
    ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        known = {(), *self.paths}
        for path in self.paths or ((),):
            elder = path[:-1] if path[-1:] in ((), (0,)) else (*path[:-1], path[-1] - 1)
            if not path or elder not in known or self.paths.count(path) > 1:
                raise UserError(
                    f"the static tree {list(self.paths)} is none at {path}: expected each node as a path of child "
                    "numbers, e.g. (0, 1), once, and with it its parent and its elder siblings"
                )

    @property
    def widest(self) -> int:
        return max(path[-1] for path in self.paths) + 1

    def grow(self, frontier: DraftCursor, rule: Verifier) -> Trees:
        parents, levels = _layout(self.paths, frontier.root.device)
        tokens, q = [frontier.root], []
        for depth, level in enumerate(levels):
            if depth:
                inner, inner_parents = levels[depth - 1][-2:]
                frontier.descend(tokens[-1][:, inner], inner_parents)
            children = rule.children(frontier.logits, level.widest)
            tokens.append(frontier.ids[children.picks.flatten(1)[:, level.picked]])
            q.append(children.q)
        drawn = _by_node(q, levels, parents.shape[1], frontier.ids) if rule.draws else None
        return trees(torch.cat(tokens, dim=1), parents, len(levels), drawn)


def _by_node(q: list[Any], levels: list[_Level], nodes: int, ids: torch.Tensor) -> Drawn:
    first = q[0]
    placed = first.new_zeros(len(first), nodes, first.shape[-1])
    for level, drawn_from in zip(levels, q, strict=True):
        placed[:, level.parent_nodes] = drawn_from
    return Drawn(placed, ids)


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (2406.16858, section 4): grows where the draft is surest, then keeps the best of all candidates.

    A candidate's score is the sum of log q along its path.  Level 1 are the ``topk`` likeliest tokens; each further
    level has the ``topk`` likeliest children of the ``topk`` best candidates of the level before.

    Raises:
        UserError: the numbers make no tree.
    """

    num_steps: int
    """Levels."""
    topk: int
    num_draft_tokens: int
    """Nodes kept, the root included."""
    ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least, most = smallest_tree(self.topk), largest_tree(self.num_steps, self.topk)
        if self.num_steps < 1 or self.topk < 1 or not least <= self.num_draft_tokens <= most:
            raise UserError(
                f"num_draft_tokens is {self.num_draft_tokens}: a tree of num_steps={self.num_steps} and "
                f"topk={self.topk} has {least} to {most} nodes, the last sampled token included"
            )

    @property
    def widest(self) -> int:
        return self.topk

    def grow(self, frontier: DraftCursor, rule: Verifier) -> Trees:
        batch, device = len(frontier.root), frontier.root.device
        # Candidates are counted through, level by level; the root is -1.
        expanded = torch.full((batch, 1), -1, device=device)
        score = torch.zeros(batch, 1, device=device)
        tokens: list[torch.Tensor] = []
        parents: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        for level in range(self.num_steps):
            if level:
                score, best = _best(scores[-1], self.topk)
                expanded = best + sum(s.shape[1] for s in scores[:-1])
                frontier.descend(tokens[-1].gather(1, best), best // self.topk)
            log_q = frontier.logits.float().log_softmax(-1)
            picks = rule.children(log_q, self.topk).picks
            scores.append((score[..., None] + log_q.gather(-1, picks)).flatten(1))
            tokens.append(frontier.ids[picks].flatten(1))
            parents.append(expanded.repeat_interleave(self.topk, dim=1))
        return self._rerank(frontier.root, *(torch.cat(x, dim=1) for x in (tokens, parents, scores)))

    def _rerank(self, root: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> Trees:
        """The best candidates as a tree.  No score exceeds its parent's, and of equals the parent comes first."""
        kept = _best(scores, self.num_draft_tokens - 1)[1].sort(dim=1).values
        node = torch.arange(self.num_draft_tokens, device=root.device).expand(len(root), -1)
        number = torch.zeros(len(root), scores.shape[1] + 1, dtype=torch.long, device=root.device)
        number.scatter_(1, kept + 1, node[:, 1:])
        above = number.gather(1, parents.gather(1, kept) + 1)
        return trees(
            torch.cat((root, tokens.gather(1, kept)), dim=1),
            torch.cat((node[:, :1] - 1, above), dim=1),
            self.num_steps,
        )


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, the earlier first among equals: values and places [B, k]."""
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], places[:, :k]


def growth_for(settings: SpeculativeSettings) -> TreeBuilder:
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
