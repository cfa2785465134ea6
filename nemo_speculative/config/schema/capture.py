"""The capture of features to disk."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_positive
from nemo_speculative.config.schema.jobs import TrainJob
from nemo_speculative.config.schema.model import FeaturesBackendConfig


class FeatureDtype(Enum):
    target = "target"
    bf16 = "bf16"
    fp8 = "fp8"


@dataclass
class CaptureJob(TrainJob):
    """The capture of the features that the training with the same command line reads."""

    output: str = MISSING
    """Directory of the features, new or existing; only missing features are computed."""
    dtype: FeatureDtype = FeatureDtype.target
    """target: as the target computes them; bf16; fp8 with a scale per hidden state, at some cost of acceptance."""
    shard_mb: int = 1024
    """MiB of a file; up to three are held in memory."""
    eagle: Optional[str] = None
    """Instead of data: a directory of EAGLE's .ckpt files (input_ids, loss_mask, hidden_state) to convert."""
    merge: list[str] = field(default_factory=list)
    """Directories of features to merge into output; nothing is computed."""
    verify: bool = False
    """Compare output with its checksums; nothing is computed."""
    plan: bool = False
    """Print sizes and free space, and stop before the target runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "capture", "shard_mb")
        require(
            not isinstance(self.backend, FeaturesBackendConfig),
            "backend=features reads what was captured: take backend=hf, sglang or remote to capture with",
        )
        require(
            not (self.merge and self.verify),
            f"merge is {self.merge} and verify is true: do one after the other",
        )
