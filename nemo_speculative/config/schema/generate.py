"""The target's answers to questions: who gives them, to what, and where they go."""

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive
from nemo_speculative.config.schema.model import ModelConfig, require_servers
from nemo_speculative.utils.errors import UserError


@dataclass
class EngineConfig:
    """Who answers."""

    _target_: str = MISSING


@dataclass
class HFEngineConfig(EngineConfig):
    """The target in this process, through transformers."""

    _target_: str = "nemo_speculative.generate_data.engines.HFEngine"
    batch_size: int = 64
    """Answers decoded at once; their keys and values share the device's memory with the target."""
    attn_implementation: str = "sdpa"
    """transformers' name of the target's attention."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        require_positive(self, "engine", "batch_size")


@dataclass
class EndpointConfig(EngineConfig):
    """OpenAI-compatible servers, best SGLang's, which tells the ids that it generated.

    The variable SGLANG_API_KEY or OPENAI_API_KEY holds their token.
    """

    _target_: str = "nemo_speculative.generate_data.endpoint.EndpointEngine"
    urls: list[str] = field(default_factory=list)
    """Where they listen, without /v1; requests go to the one with the fewest under way."""
    model: Optional[str] = None
    """Which of their models answers; null: the only one that they have."""
    concurrency: int = 32
    """Requests under way at each server."""
    attempts: int = 5
    """How often a request is tried in a run; one that no server could take, being down or busy, was not tried."""
    timeout: float = 600.0
    """Seconds for an answer."""
    give_up_after: float = 300.0
    """Seconds without an answer of any server after which the run ends, to be gone on with later."""

    def __post_init__(self) -> None:
        require_servers("engine.urls", self.urls)
        require_positive(self, "engine", "concurrency", "attempts", "timeout", "give_up_after")


@dataclass
class ReasoningConfig:
    """What becomes of the reasoning of an answer in the conversation; its ids always hold it."""

    _target_: str = MISSING
    tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """What opens and what closes it; the opening one may stand in the prompt."""

    def __post_init__(self) -> None:
        require(
            len(self.tags) == 2 and all(self.tags),
            f"reasoning.tags is {self.tags}: expected two, what opens the reasoning and what closes it",
        )


@dataclass
class GenerateJob:
    """Every answer of a data file given anew by the target."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The target; an endpoint takes no more than its tokenizer and chat template."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    path: str = MISSING
    """JSONL of conversations, or of rows of token ids, as recipes/prepare_data.py writes it."""
    output: str = MISSING
    """A directory; each range gets one of its own in it, <start>-<end>, with answers.jsonl, left_out.jsonl and
    manifest.json. What it holds is found again by the lines' ids and contents."""
    range: Optional[str] = None
    """start:end, the lines to answer, from 0 on, without end; null: all."""
    temperature: float = 0.0
    """Of the answers; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of the likeliest tokens that holds so much probability; 1: from all."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    seed: int = 0
    """Of the sampling; each answer has its own seed, from this one, the conversation's id and the turn."""
    max_new_tokens: int = 2048
    """Longest answer, in tokens."""
    max_length: Optional[int] = None
    """Longest conversation, in tokens; null: the target's context."""
    keep_cut: bool = True
    """Keep conversations with an answer that was cut at its limit; false: they are skipped."""
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    data: Any = None
    """A model brings it for a training; not used here."""
    optimizer: Any = None
    """A model brings it for a training; not used here."""
    trainer: Any = None
    """A model brings it for a training; not used here."""
    evaluation: Any = None
    """A model brings it for a training; not used here."""

    def __post_init__(self) -> None:
        require_positive(self, "generate", "max_new_tokens", "max_length")
        require_not_negative(self, "generate", "seed")
        if self.range is not None:
            start, end = self.bounds()
            require(end is None or start < end, f"range is {self.range}: it holds no line; expected start:end")

    def bounds(self) -> tuple[int, Optional[int]]:
        """Where the range starts and ends; None: nowhere."""
        parts = re.fullmatch(r"(\d*):(\d*)", self.range or ":")
        if parts is None:
            raise UserError(f"range is {self.range!r}: expected start:end, e.g. range=0:17500 or range=17500:")
        return int(parts[1] or 0), int(parts[2]) if parts[2] else None


@dataclass
class MergeJob:
    """Parts of generated answers put together."""

    parts: list[str] = field(default_factory=list)
    """Directories that generate_data.py wrote, or the one above them."""
    output: str = MISSING
    """The JSONL file to write, one that does not exist."""
    allow_missing: bool = False
    """Write it although lines are missing or failed."""
