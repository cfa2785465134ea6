"""The speculative settings of a draft, and which of them make a tree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speculative:
    """The settings that a draft is served with, under SGLang's names."""

    num_steps: int
    topk: int
    num_draft_tokens: int
    """The last sampled token included."""


def default_draft_tokens(num_steps: int, topk: int) -> int:
    """All of a chain, or as many nodes as a full beam, and the token before them."""
    return num_steps * topk + 1


def largest_tree(num_steps: int, topk: int) -> int:
    """Candidates of ``num_steps`` levels that keep ``topk`` branches each, and the root."""
    return topk + (num_steps - 1) * topk * topk + 1
