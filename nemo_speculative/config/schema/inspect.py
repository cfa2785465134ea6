"""What a look at the data takes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from nemo_speculative.config.schema.common import require
from nemo_speculative.config.schema.data import DataConfig
from nemo_speculative.config.schema.model import ModelConfig


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
    """Conversations, from the first on, whose every turn is compared with what a chat server would render; 0: none."""
    url: Optional[str] = None
    """A running SGLang server that is asked what it renders; null: what the tokenizer's template says it would."""
    seed: int = 0
    """Of the order of the data: that of the training."""
    optimizer: Any = None
    """A model brings it for a training; not used here."""
    trainer: Any = None
    """A model brings it for a training; not used here."""
    evaluation: Any = None
    """A model brings it for a training; not used here."""

    def __post_init__(self) -> None:
        require(self.compare >= 0, f"compare is {self.compare}: it must not be negative")

    @property
    def name(self) -> str:
        """Of the data."""
        named = self.data.path or getattr(self.data, "prepared", None) or "stdlib"
        return Path(named).name.removesuffix(".jsonl")

    @property
    def directory(self) -> Path:
        """Where the report goes."""
        return Path(self.output or f"outputs/inspect-{self.name}").expanduser()
