"""The evaluation of a draft."""

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

from nemo_speculative.config.schema.common import require, require_positive


@dataclass
class EvaluationConfig:
    """The evaluation of the draft with the built-in lossless decoder."""

    num_questions: int = 100
    """Held-out questions at the end of a run."""
    selection_questions: int = 16
    """Held-out questions at every checkpoint, which decide `best`."""
    max_new_tokens: Optional[int] = None
    """Longest answer in tokens; null: 256, or in evaluate.py as in the run."""
    num_threads: Optional[int] = None
    """CPU threads; null: torch's choice, or in evaluate.py as in the run."""
    ngram: int = 3
    """Longest n-gram of prompt-lookup drafting, the baseline."""
    batch_size: int = 1
    """Questions decoded together; speed is compared at this size."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this probability; 1: all tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: all tokens."""
    rejection_sampling: bool = False
    """At a temperature above 0, draw the draft tokens and accept each with min(1, p/q): chains only; false: SGLang's
    default rule, which needs no draft probabilities."""
    static_tree: bool = False
    """Decode with EAGLE-1's published static tree instead of the checkpoint's settings."""
    seed: int = 0
    """Seed of the sampling."""

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
        """Length of the longest answer, in tokens."""
        return self.max_new_tokens or 256

    def like(self, run: dict[str, Any]) -> "EvaluationConfig":
        """A copy with the values of the configuration ``run`` where this one has null."""
        return replace(
            self,
            max_new_tokens=self.max_new_tokens or run.get("max_new_tokens"),
            num_threads=self.num_threads or run.get("num_threads"),
        )
