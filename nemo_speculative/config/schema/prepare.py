"""The preparation of datasets: where they come from, and what is left out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive
from nemo_speculative.config.schema.data import DataConfig

CACHE = "cache/dataset"


@dataclass
class DatasetConfig(DataConfig):
    """A dataset in any known shape: prepared once, by recipes/prepare_data.py or the first training that wants it."""

    _target_: str = "nemo_speculative.prepare_data.load.load_prepared"
    path: Optional[str] = None
    """A file or folder that holds it; null: repository."""
    repository: str = MISSING
    """Name on the hub, or a directory that the `datasets` library reads."""
    subset: Optional[str] = None
    """Which of the repository's configurations; null: its default."""
    revision: Optional[str] = None
    """Branch, tag or commit of the repository; null: its newest."""
    split: str = "train"
    """Of the repository, or of a directory that `datasets` saved."""
    held_out_split: Optional[str] = None
    """The repository's split for held_out.jsonl; null: held_out_share of split."""
    prepared: str = MISSING
    """Directory of the prepared rows: train.jsonl and held_out.jsonl."""


@dataclass
class SourceConfig:
    """One part of a mix."""

    name: str = MISSING
    """An option of conf/data, or a file or folder; beside a path, any name."""
    path: Optional[str] = None
    """A file or folder that holds it; null: where the name leads."""
    weight: float = 1.0
    """Its share of the rows written, beside the other weights, until it has none left."""

    def __post_init__(self) -> None:
        require_positive(self, f"data.sources ({self.name})", "weight")


@dataclass
class MixDataConfig(DataConfig):
    """Several sources, interleaved by weight."""

    _target_: str = "nemo_speculative.prepare_data.load.load_prepared"
    path: Optional[str] = None
    sources: list[SourceConfig] = MISSING
    """Of each: name, weight, and path if it is not to be had by its name."""
    prepared: str = MISSING
    """Directory of the prepared rows: train.jsonl and held_out.jsonl."""


@dataclass
class FilterConfig:
    """What is too short, too long or too odd to learn from, in any language."""

    min_characters: int = 2
    """Of all messages together."""
    max_characters: Optional[int] = None
    """Of all messages together; null: as long as they are."""
    max_tokens: Optional[int] = None
    """Of rows that are token ids; null: as long as they are."""
    min_variety: float = 0.02
    """Compressed over plain size of texts from 2000 bytes on; loops lie below, 0 keeps them."""
    max_control_share: float = 0.01
    """Share of characters that are control characters or stand for undecodable bytes."""

    def __post_init__(self) -> None:
        require_not_negative(self, "filters", "min_characters", "min_variety", "max_control_share")
        require_positive(self, "filters", "max_characters", "max_tokens")


@dataclass
class PrepareJob:
    """The preparation of a dataset or a mix."""

    data: DataConfig = field(default_factory=DataConfig)
    output: Optional[str] = None
    """Directory of the result; null: data.prepared, or cache/dataset/ and the name of data.path."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename before a shape is looked for: {theirs: known}."""
    tokenizer: Optional[str] = None
    """Directory or hub name: finds the assistant's part of `text` rows, which its chat template formatted."""
    keep_unanswered: bool = False
    """Keep conversations without an answer, for a target to write it."""
    deduplicate: bool = True
    """Leave out conversations that were there before, white space aside."""
    max_conversations: Optional[int] = None
    """Most rows of train.jsonl; null: all."""
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        require(
            self.max_conversations is None or self.max_conversations > 0,
            f"max_conversations is {self.max_conversations}: it must be greater than 0",
        )

    @property
    def directory(self) -> Path:
        """Where the result goes.

        Raises:
            UserError: the data has no files that could be prepared.
        """
        if self.output:
            return Path(self.output)
        if isinstance(self.data, DatasetConfig | MixDataConfig):
            return Path(self.data.prepared)
        require(
            bool(self.data.path), "data: nothing to prepare here; give data=jsonl data.path=FILE or one of conf/data"
        )
        return Path(CACHE) / Path(self.data.path or "").name.partition(".")[0]
