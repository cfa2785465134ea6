"""The speculative settings of a draft, and which of them make a tree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculativeSettings:
    """The settings that a draft is served with, under SGLang's names."""

    num_steps: int
    topk: int
    num_draft_tokens: int
    """The last sampled token included."""

    def with_changes(self, steps: int | None, topk: int | None, tokens: int | None) -> "SpeculativeSettings":
        """A copy with other values; where only steps or top-k change, it verifies a whole chain or a full beam."""
        steps, topk = steps or self.num_steps, topk or self.topk
        unchanged = (steps, topk) == (self.num_steps, self.topk)
        default = self.num_draft_tokens if unchanged else default_draft_tokens(steps, topk)
        return SpeculativeSettings(steps, topk, tokens or default)

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
