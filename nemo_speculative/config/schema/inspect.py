"""The report on the data of a training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

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
    """Number of conversations compared turn by turn with what a chat server would render; 0: none."""
    url: Optional[str] = None
    """A running SGLang server that renders them; null: the tokenizer's chat template does."""
    seed: int = 0
    """Seed of the order of the data, as in the training."""

    def __post_init__(self) -> None:
        require(self.compare >= 0, f"compare is {self.compare}: it must not be negative")

    @property
    def name(self) -> str:
        """Name of the data."""
        named = self.data.path or getattr(self.data, "prepared", None) or "stdlib"
        return Path(named).name.removesuffix(".jsonl")

    @property
    def directory(self) -> Path:
        """Directory of the report."""
        return Path(self.output or f"outputs/inspect-{self.name}").expanduser()
