"""The preparation of datasets: their sources, and the filters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive
from nemo_speculative.config.schema.data import DataConfig

CACHE = "cache/dataset"


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
class DefaultDataConfig(DatasetConfig):
    """The JSONL file `data.path` where it is given, else a dataset."""

    _target_: str = "nemo_speculative.prepare_data.load.load_file_or_prepared"


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
        require_not_negative(self, "filters", "min_characters", "min_variety", "max_control_share")
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
        require(
            self.max_conversations is None or self.max_conversations > 0,
            f"max_conversations is {self.max_conversations}: it must be greater than 0",
        )

    @property
    def directory(self) -> Path:
        """Directory of the result.

        Raises:
            UserError: the data has no files to prepare.
        """
        if self.output:
            return Path(self.output)
        if isinstance(self.data, DatasetConfig | MixDataConfig):
            return Path(self.data.prepared)
        require(
            bool(self.data.path), "data: nothing to prepare here; give data=jsonl data.path=FILE or one of conf/data"
        )
        return Path(CACHE) / Path(self.data.path or "").name.partition(".")[0]
