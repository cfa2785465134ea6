"""Conversations: their source, and their preparation, generation and inspection before a training."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require_positive, require_within
from nemo_speculative.config.schema.target import ModelConfig, require_servers
from nemo_speculative.utils.errors import UserError

Answers = StrEnum("Answers", ["given", "target"])


@dataclass
class DataConfig:
    """Conversations from a JSONL file, and how they become packed rows of tokens."""

    _target_: str = "nemo_speculative.data.conversations.load_jsonl"
    path: Optional[str] = MISSING
    """JSONL file; a line is {"conversations": [{"role", "content"}]} or {"input_ids", "loss_mask"}."""
    held_out_path: Optional[str] = None
    """JSONL file for validation and evaluation; null: held_out_share of path, chosen by id."""
    held_out_share: float = 0.05
    """Share of the conversations kept out of training when held_out_path is null."""
    max_conversations: Optional[int] = None
    """Most conversations to train on, the first of a seeded order; null: all."""
    answers: Answers = Answers.given
    """given: train on the answers in the data; target: the target answers every question itself first (on-policy)."""
    max_answer_tokens: int = 512
    """Longest answer generated with answers=target, in tokens."""
    generation_batch_size: int = 64
    """Conversations answered at once with answers=target."""
    max_length: Optional[int] = None
    """Longest conversation in tokens, longer ones are truncated; null: 2048, or the target's context if shorter."""
    packed_length: Optional[int] = None
    """Tokens in one packed row; null: max_length."""
    cache_dir: str = "cache"
    """Directory of tokenized rows (tokens/) and generated answers (answers/), keyed by their inputs."""
    workers: Optional[int] = None
    """Processes that tokenize a long file; null: the number of cores, at most 8."""

    def __post_init__(self) -> None:
        require_positive(
            self, "data", "max_length", "packed_length", "max_answer_tokens", "generation_batch_size",
            "max_conversations", "workers",
        )  # fmt: skip
        require_within("[0, 1)", self, "data", "held_out_share")

    def lengths(self, context: int) -> tuple[int, int]:
        """max_length and packed_length for a target of ``context`` tokens; raises UserError if they do not fit."""
        longest = self.max_length or min(2048, context)
        row = self.packed_length or longest
        if longest > context:
            raise UserError(f"data.max_length is {longest}, longer than the target's context of {context}: lower it")
        if longest > row:
            raise UserError(
                f"data.max_length is {longest}, longer than data.packed_length={row}: a conversation must fit into one "
                "row; raise data.packed_length or lower data.max_length"
            )
        return longest, row


@dataclass
class TinyDataConfig(DataConfig):
    """Questions about the standard library, answered by the target itself."""

    _target_: str = "nemo_speculative.data.stdlib.load_stdlib"
    path: Optional[str] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            raise UserError(f"data.path is {self.path}, and data=tiny reads no file: add data=jsonl")


@dataclass
class DatasetConfig(DataConfig):
    """A dataset in any known shape, prepared once by recipes/prepare_data.py or the first training that reads it."""

    _target_: str = "nemo_speculative.prepare_data.load.load_prepared"
    path: Optional[str] = None
    """A local file or folder of the dataset; null: repository."""
    repository: str = MISSING
    """Name on the hub, or a directory that the `datasets` library reads."""
    subset: Optional[str] = None
    """Configuration of the repository; null: its default."""
    revision: Optional[str] = None
    """Branch, tag or commit of the repository; null: the newest."""
    split: str = "train"
    """Split of the repository, or of a directory saved by `datasets`."""
    held_out_split: Optional[str] = None
    """Split for held_out.jsonl; null: held_out_share of split."""
    prepared: str = MISSING
    """Directory of the prepared rows: train.jsonl and held_out.jsonl."""


@dataclass
class SourceConfig:
    """One part of a mix."""

    name: str = MISSING
    """An option of conf/data, a file or a folder; with a path, any name."""
    path: Optional[str] = None
    """A local file or folder; null: found by name."""
    weight: float = 1.0
    """Relative share of the rows, until the source is exhausted."""

    def __post_init__(self) -> None:
        require_positive(self, f"data.sources ({self.name})", "weight")


@dataclass
class MixDataConfig(DataConfig):
    """Several sources, interleaved by weight."""

    _target_: str = "nemo_speculative.prepare_data.load.load_prepared"
    path: Optional[str] = None
    sources: list[SourceConfig] = MISSING
    """Sources with name, weight, and path if the name is not enough."""
    prepared: str = MISSING
    """Directory of the prepared rows: train.jsonl and held_out.jsonl."""


@dataclass
class FilterConfig:
    """Limits beyond which a conversation is left out."""

    min_characters: int = 2
    """Fewest characters of all messages together."""
    max_characters: Optional[int] = None
    """Most characters of all messages together; null: no limit."""
    max_tokens: Optional[int] = None
    """Most tokens of a row of token ids; null: no limit."""
    min_variety: float = 0.02
    """Lowest ratio of compressed to plain size of texts of 2000 bytes or more, to leave out loops; 0: no limit."""
    max_control_share: float = 0.01
    """Largest fraction of control characters and replacement characters."""

    def __post_init__(self) -> None:
        require_within("[0, inf)", self, "filters", "min_characters", "min_variety", "max_control_share")
        require_positive(self, "filters", "max_characters", "max_tokens")


@dataclass
class PrepareJob:
    """The preparation of a dataset or a mix."""

    data: DataConfig = field(default_factory=DataConfig)
    output: Optional[str] = None
    """Directory of the result; null: data.prepared, or cache/dataset/<name of data.path>."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename before the shape is detected: {old: new}."""
    tokenizer: Optional[str] = None
    """Tokenizer (directory or hub name) whose chat template formatted `text` rows, to find the assistant's part."""
    keep_unanswered: bool = False
    """Keep conversations without an answer, for a target to generate it."""
    deduplicate: bool = True
    """Leave out duplicates, ignoring white space."""
    max_conversations: Optional[int] = None
    """Most rows of train.jsonl; null: all."""
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        require_positive(self, "", "max_conversations")

    @property
    def directory(self) -> Path:
        """Directory of the result; raises UserError if the data has no files to prepare."""
        if self.output:
            return Path(self.output)
        if isinstance(self.data, DatasetConfig | MixDataConfig):
            return Path(self.data.prepared)
        if not self.data.path:
            raise UserError("data: nothing to prepare here; give data=jsonl data.path=FILE or one of conf/data")
        return Path("cache/dataset") / Path(self.data.path).name.partition(".")[0]


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
    """OpenAI-compatible servers, best SGLang, which returns ids; SGLANG_API_KEY or OPENAI_API_KEY holds their token."""

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
        if len(self.tags) != 2 or not all(self.tags):
            raise UserError(f"reasoning.tags is {self.tags}: expected two, the opening and the closing tag")


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
        require_positive(self, "", "max_new_tokens", "max_length")
        require_within("[0, inf)", self, "", "seed")
        start, end = self.bounds()
        if end is not None and start >= end:
            raise UserError(f"range is {self.range}: it holds no line; expected start:end")

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


@dataclass
class InspectJob:
    """A report on conversations as a training reads them, without any weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: Optional[str] = None
    """Directory of report.html and figures.json; null: outputs/inspect-<name of the data>."""
    show: list[str] = field(default_factory=list)
    """Conversations to show with their mask: ids, or lines of the file; empty: the first three."""
    compare: int = 1000
    """Number of conversations compared turn by turn with what a chat server would render; 0: none."""
    url: Optional[str] = None
    """A running SGLang server that renders them; null: the tokenizer's chat template does."""
    seed: int = 0
    """Seed of the order of the data, as in the training."""

    def __post_init__(self) -> None:
        require_within("[0, inf)", self, "", "compare")

    @property
    def name(self) -> str:
        """Name of the data."""
        named = self.data.path or getattr(self.data, "prepared", None) or "stdlib"
        return Path(named).name.removesuffix(".jsonl")

    @property
    def directory(self) -> Path:
        """Directory of the report."""
        return Path(self.output or f"outputs/inspect-{self.name}").expanduser()
