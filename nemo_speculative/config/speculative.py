"""The speculative settings of a draft, and which of them make a tree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculativeSettings:
    """The settings that a draft is served with, under SGLang's names."""

    num_steps: int
    topk: int
    num_draft_tokens: int
    """The last sampled token included."""

    def with_changes(
        self, num_steps: int | None = None, topk: int | None = None, num_draft_tokens: int | None = None
    ) -> "SpeculativeSettings":
        """A copy with other values; where only steps or top-k change, it verifies a whole chain or a full beam."""
        steps, wide = num_steps or self.num_steps, topk or self.topk
        current = self.num_draft_tokens if (steps, wide) == (self.num_steps, self.topk) else None
        return SpeculativeSettings(steps, wide, num_draft_tokens or current or default_draft_tokens(steps, wide))

    def __str__(self) -> str:
        if self.topk == 1:
            return f"chains of {self.num_steps} draft tokens"
        return f"trees of {self.num_draft_tokens - 1} draft tokens ({self.num_steps} levels, top-k {self.topk})"


def default_draft_tokens(num_steps: int, topk: int) -> int:
    """The nodes of a whole chain or a full beam, and the token before them."""
    return num_steps * topk + 1


def smallest_tree(topk: int) -> int:
    """The last sampled token and a first level of ``topk`` branches."""
    return topk + 1


def largest_tree(num_steps: int, topk: int) -> int:
    """Candidates of ``num_steps`` levels that keep ``topk`` branches each, and the root."""
    return topk + (num_steps - 1) * topk * topk + 1
