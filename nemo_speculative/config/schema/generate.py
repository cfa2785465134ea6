"""The generation of the target's answers to the questions of a data file."""

import re
from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive
from nemo_speculative.config.schema.model import ModelConfig, require_servers
from nemo_speculative.utils.errors import UserError


@dataclass
class EngineConfig:
    """The engine that generates answers."""

    _target_: str = MISSING


@dataclass
class HFEngineConfig(EngineConfig):
    """The target in this process, through transformers."""

    _target_: str = "nemo_speculative.generate_data.engines.HFEngine"
    batch_size: int = 64
    """Answers decoded together; their KV cache shares the device's memory with the target."""
    attn_implementation: str = "sdpa"
    """Attention implementation of transformers."""
    device: str = "auto"
    """auto: cuda if available, else cpu."""

    def __post_init__(self) -> None:
        require_positive(self, "engine", "batch_size")


@dataclass
class EndpointConfig(EngineConfig):
    """OpenAI-compatible servers, preferably SGLang, which returns the generated ids.

    The environment variable SGLANG_API_KEY or OPENAI_API_KEY holds their token.
    """

    _target_: str = "nemo_speculative.generate_data.endpoint.EndpointEngine"
    urls: list[str] = field(default_factory=list)
    """Addresses without /v1; a request goes to the server with the fewest in flight."""
    model: Optional[str] = None
    """Name of the model on the servers; null: the only one."""
    concurrency: int = 32
    """Requests in flight at each server."""
    attempts: int = 5
    """Attempts of a request in a run; a server that is down or busy does not count as one."""
    timeout: float = 600.0
    """Seconds to wait for an answer."""
    give_up_after: float = 300.0
    """Seconds without an answer of any server after which the run ends; the same command resumes it."""

    def __post_init__(self) -> None:
        require_servers("engine.urls", self.urls)
        require_positive(self, "engine", "concurrency", "attempts", "timeout", "give_up_after")


@dataclass
class ReasoningConfig:
    """Treatment of the reasoning in an answer's text; its token ids always include it."""

    _target_: str = MISSING
    tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """Opening and closing tag; the opening one may be in the prompt."""

    def __post_init__(self) -> None:
        require(
            len(self.tags) == 2 and all(self.tags),
            f"reasoning.tags is {self.tags}: expected two, the opening and the closing tag",
        )


@dataclass
class GenerateJob:
    """The generation of new answers for a data file by the target."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The target; with engine=endpoint only its tokenizer and chat template are used."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    path: str = MISSING
    """JSONL of conversations or token ids, as recipes/prepare_data.py writes it."""
    output: str = MISSING
    """Directory with a subdirectory <start>-<end> for each range: answers.jsonl, left_out.jsonl and manifest.json.
    Stored answers are matched by id and content of the lines."""
    range: Optional[str] = None
    """Lines to answer, start:end, from 0, end excluded; null: all."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this probability; 1: all tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: all tokens."""
    seed: int = 0
    """Seed of the sampling; each answer's seed derives from it, the conversation's id and the turn."""
    max_new_tokens: int = 2048
    """Longest answer, in tokens."""
    max_length: Optional[int] = None
    """Longest conversation, in tokens; null: the target's context."""
    keep_cut: bool = True
    """Keep conversations with a truncated answer; false: leave them out."""
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)

    def __post_init__(self) -> None:
        require_positive(self, "generate", "max_new_tokens", "max_length")
        require_not_negative(self, "generate", "seed")
        if self.range is not None:
            start, end = self.bounds()
            require(end is None or start < end, f"range is {self.range}: it holds no line; expected start:end")

    def bounds(self) -> tuple[int, Optional[int]]:
        """Start and end of the range; end None: the last line."""
        parts = re.fullmatch(r"(\d*):(\d*)", self.range or ":")
        if parts is None:
            raise UserError(f"range is {self.range!r}: expected start:end, e.g. range=0:17500 or range=17500:")
        return int(parts[1] or 0), int(parts[2]) if parts[2] else None


@dataclass
class MergeJob:
    """The merge of generated answers."""

    parts: list[str] = field(default_factory=list)
    """Directories written by generate_data.py, or their parent."""
    output: str = MISSING
    """JSONL file to create."""
    allow_missing: bool = False
    """Write the file although lines are missing or failed."""
