"""Features on disk: what is captured, and where it goes."""

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
    """The features of a training: the same command line says what it reads, training and held-out conversations."""

    output: str = MISSING
    """Directory of the features: a new one, or one to go on with, in which only what is missing is computed."""
    dtype: FeatureDtype = FeatureDtype.target
    """As the target computes them; bf16; or fp8 with a scale for each hidden state, which costs some acceptance."""
    shard_mb: int = 1024
    """MiB of a shard; up to three are held in memory."""
    eagle: Optional[str] = None
    """In place of data: a directory of EAGLE's .ckpt files (input_ids, loss_mask, hidden_state), to convert."""
    merge: list[str] = field(default_factory=list)
    """Directories of features whose shards are put into output; nothing is computed."""
    verify: bool = False
    """Compare all of output with its checksums; nothing is computed."""
    plan: bool = False
    """Print what it takes, and stop before the target runs."""

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
