"""The root schemas of the recipes, which check values across groups."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require
from nemo_speculative.config.schema.data import Answers, DataConfig
from nemo_speculative.config.schema.draft import DraftConfig
from nemo_speculative.config.schema.evaluation import EvaluationConfig
from nemo_speculative.config.schema.exporter import ExporterConfig, FormConfig
from nemo_speculative.config.schema.model import BackendConfig, HFBackendConfig, ModelConfig, PlacementConfig
from nemo_speculative.config.schema.optimizer import OptimizerConfig
from nemo_speculative.config.schema.trainer import LoggerConfig, ParallelismConfig, TrainerConfig


class Resume(Enum):
    never = "never"
    auto = "auto"


@dataclass
class TrainJob:
    """A whole training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exporter: ExporterConfig = field(default_factory=ExporterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = MISSING
    """The run's directory: config.yaml, metrics.jsonl, checkpoints/, summary.json."""
    seed: int = 0
    """Seed of the draft's initialization and of the order of the data."""
    resume: Resume = Resume.never
    """auto: resume from the newest checkpoint in output_dir, if there is one."""
    plan: bool = False
    """Print what the training would do and need, and stop without loading weights."""

    def __post_init__(self) -> None:
        require(
            self.backend.DECODES or self.data.answers is Answers.given,
            "data.answers=target needs backend=hf, which alone decodes: answer the questions first, and train on them "
            "with data.answers=given",
        )
        require(
            not self.evaluation.rejection_sampling or self.exporter.topk == 1 or self.evaluation.static_tree,
            f"evaluation.rejection_sampling is true and exporter.topk is {self.exporter.topk}: a dynamic tree keeps "
            "draft tokens for their score, and then rejection sampling is not lossless; set exporter.topk=1, or leave "
            "it off",
        )

    def data_ranks(self, ranks: int) -> int:
        """The number of data-parallel ranks, of ``ranks`` processes.

        Raises:
            UserError: the parallelism is for another number of processes, or a global batch cannot be split over them.
        """
        replicate, shard = self.parallelism.sizes(ranks)
        size, context = self.trainer.global_batch_size, self.parallelism.context
        shared = f" ({context} processes share each)" if context > 1 else ""
        require(
            size % (replicate * shard) == 0,
            f"trainer.global_batch_size is {size}: it cannot be split evenly over {replicate * shard} ranks{shared}; "
            "take a multiple of them",
        )
        return replicate * shard


@dataclass
class EvaluateJob:
    """The evaluation of a checkpoint."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one recorded in the checkpoint."""
    questions: Optional[str] = None
    """JSONL of questions: conversations (used up to the first answer) or input_ids; null: those of the run."""
    model: PlacementConfig = field(default_factory=PlacementConfig)
    backend: HFBackendConfig = field(default_factory=HFBackendConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_steps: Optional[int] = None
    """Draft tokens along a branch; null: as recorded in the checkpoint."""
    topk: Optional[int] = None
    """Branches a draft step keeps; null: as recorded in the checkpoint."""
    num_draft_tokens: Optional[int] = None
    """Tokens verified at once, the last sampled one included; null: as recorded, or steps * topk + 1."""
    device: str = "auto"
    """auto: cuda if available, else cpu."""
    draft_class: Optional[str] = None
    """Class of a draft defined outside this package; importing it registers its architecture."""
    trust_remote_code: bool = False
    """Whether the target's own modeling code may run."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "topk", "num_draft_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}: it must be above 0")


@dataclass
class ConvertJob:
    """The conversion of a draft from any known format."""

    checkpoint: str = MISSING
    """Directory of the draft: of this project, EAGLE (SafeAILab), SpecForge, NeMo AutoModel or speculators."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one named in the draft's files."""
    output: Optional[str] = None
    """Directory to create; null: next to the draft, named after it and the form."""
    aux_layers: Optional[list[int]] = None
    """Layers of the target that it reads, if its files are wrong; null: as in its files, or EAGLE's default."""
    form: FormConfig = field(default_factory=FormConfig)
    exporter: ExporterConfig = field(default_factory=ExporterConfig)
    """Speculative settings for a draft of another project; dtype null keeps the file's."""
    trust_remote_code: bool = False
    """Whether the target's own modeling code may run."""


@dataclass
class PruneJob:
    """A smaller draft vocabulary for a trained draft."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    output: str = MISSING
    """A new directory; the pruned checkpoint is its model/."""
    vocab_size: Any = MISSING
    """Entries that remain: a number, or a coverage such as 99.5%."""
    data: DataConfig = field(default_factory=DataConfig)
    """Conversations whose assistant tokens are counted, preferably the training data."""
