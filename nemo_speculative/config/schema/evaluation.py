"""The measurement of a draft."""

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

from nemo_speculative.config.schema.common import require, require_positive


@dataclass
class EvaluationConfig:
    """The measurement of the draft with the built-in lossless decoder."""

    num_questions: int = 100
    """Held-out questions at the end of a run."""
    selection_questions: int = 16
    """Held-out questions measured at every checkpoint, by which `best` is chosen."""
    max_new_tokens: Optional[int] = None
    """Longest answer; null: 256, or in evaluate.py what the run used."""
    num_threads: Optional[int] = None
    """CPU threads while measuring; null: torch's choice, or in evaluate.py what the run used."""
    ngram: int = 3
    """Longest n-gram that prompt-lookup drafting, the baseline, matches."""
    batch_size: int = 1
    """Questions answered at once; speed is compared at this size."""
    temperature: float = 0.0
    """Of the answers; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of the likeliest tokens that holds so much probability; 1: from all."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    rejection_sampling: bool = False
    """At a temperature above 0, draw the draft tokens and accept each with min(1, p/q): chains only; false: SGLang's
    default rule, which needs no draft probabilities."""
    static_tree: bool = False
    """EAGLE-1's published static tree in place of what the checkpoint is served with."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        require_positive(
            self, "evaluation", "num_questions", "selection_questions", "max_new_tokens", "ngram", "num_threads",
            "batch_size",
        )  # fmt: skip
        require(
            0 <= self.temperature < math.inf,
            f"evaluation.temperature is {self.temperature}: expected a number of at least 0 (0 is greedy), e.g. 1",
        )
        require(
            0 < self.top_p <= 1,
            f"evaluation.top_p is {self.top_p}: expected a share above 0 and at most 1 (1 is off)",
        )
        require(self.top_k >= 0, f"evaluation.top_k is {self.top_k}: expected a number of tokens, or 0 for all")

    @property
    def answer_tokens(self) -> int:
        """Longest answer."""
        return self.max_new_tokens or 256

    def like(self, run: dict[str, Any]) -> "EvaluationConfig":
        """With what the configuration of a run says where this one says nothing."""
        return replace(
            self,
            max_new_tokens=self.max_new_tokens or run.get("max_new_tokens"),
            num_threads=self.num_threads or run.get("num_threads"),
        )
