"""A training: optimizer, schedule, loop, parallelism, logger, and the capture of the features that it reads."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.checkpoint import EvaluationConfig, ExporterConfig
from nemo_speculative.config.schema.common import Dtype, require_positive, require_within
from nemo_speculative.config.schema.data import Answers, DataConfig
from nemo_speculative.config.schema.draft import DraftConfig
from nemo_speculative.config.schema.target import BackendConfig, FeaturesBackendConfig, ModelConfig
from nemo_speculative.utils.errors import UserError

DecayType = StrEnum("DecayType", ["constant", "linear", "cosine", "sqrt"])
FeatureDtype = StrEnum("FeatureDtype", ["target", "bf16", "fp8"])
Resume = StrEnum("Resume", ["never", "auto"])


class WandbMode(StrEnum):  # a class, so that its values are literals, as wandb declares them
    online = "online"
    offline = "offline"


@dataclass
class OptimizerConfig:
    """AdamW with torchtitan's warm-up, stable and decay schedule."""

    _target_: str = "nemo_speculative.training.optimizer.adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.015
    """Fraction of the steps for the warm-up."""
    decay_ratio: float = 1.0
    """Fraction of the steps after the warm-up in which the learning rate decays."""
    decay_type: DecayType = DecayType.cosine
    """Shape of the decay; constant: none."""
    min_lr_factor: float = 0.0
    """Final learning rate as a fraction of lr."""
    clip_norm: float = 0.5
    """Gradients are clipped to this norm."""
    ema_decay: Optional[float] = None
    """Decay of an exponential moving average of the weights, which is then evaluated and exported; null: none."""

    def __post_init__(self) -> None:
        require_positive(self, "optimizer", "lr", "clip_norm", "eps")
        require_within("[0, inf)", self, "optimizer", "weight_decay")
        require_within("[0, 1]", self, "optimizer", "warmup_ratio", "decay_ratio", "min_lr_factor")
        require_within("[0, 1)", self, "optimizer", "ema_decay")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}: expected two numbers in [0, 1)")
        if self.decay_type is DecayType.constant and self.min_lr_factor:
            raise UserError(
                f"optimizer.min_lr_factor is {self.min_lr_factor}, and optimizer.decay_type=constant has no decay: "
                "leave out one of them"
            )

    def decay_share(self, warmup_share: float) -> float:
        """Fraction of all steps in which the learning rate decays, after a warm-up of ``warmup_share`` of them."""
        return 0.0 if self.decay_type is DecayType.constant else self.decay_ratio * (1 - warmup_share)


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices; AdamW for norms, biases, embedding and head."""

    _target_: str = "nemo_speculative.training.optimizer.muon"
    muon_lr: Optional[float] = None
    """Learning rate of the matrices, whose updates are scaled to the size of AdamW's; null: lr."""
    momentum: float = 0.95
    """Momentum of Muon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "optimizer", "muon_lr")
        require_within("[0, 1)", self, "optimizer", "momentum")


@dataclass
class ParallelismConfig:
    """The division of a draft's training over replicate * shard * context processes, which a launcher starts."""

    replicate: int = 1
    """Replicas of the draft (DDP, HSDP); -1: ranks / (shard * context)."""
    shard: int = 1
    """Ranks that shard one draft, each training on its own rows (FSDP2); -1: ranks / (replicate * context)."""
    context: int = 1
    """Ranks that split the positions of each row (context parallelism)."""
    offload: bool = False
    """Keep float32 weights and optimizer states of the draft in host memory, and step there."""

    def __post_init__(self) -> None:
        for name in ("replicate", "shard"):
            size = getattr(self, name)
            if size != -1 and size < 1:
                raise UserError(f"parallelism.{name} is {size}: expected -1, or above 0")
        require_positive(self, "parallelism", "context")
        if self.replicate == self.shard == -1:
            raise UserError("parallelism.replicate and parallelism.shard are both -1: set one of them")

    def sizes(self, ranks: int) -> tuple[int, int]:
        """``replicate`` and ``shard`` on ``ranks`` processes; raises UserError if the sizes do not multiply to them."""
        replicate, shard = self.replicate, self.shard
        if replicate == -1:
            replicate = ranks // (shard * self.context)
        if shard == -1:
            shard = ranks // (replicate * self.context)
        if replicate * shard * self.context != ranks:
            raise UserError(
                f"parallelism: replicate={self.replicate}, shard={self.shard} and context={self.context} do not "
                f"multiply to the {ranks} process(es) that were started; start as many (torchrun --nproc-per-node; for "
                "plan=true write WORLD_SIZE=N before the command), or take another parallelism (ddp, fsdp2, hsdp, cp)"
            )
        return replicate, shard


@dataclass
class TrainerConfig:
    max_steps: Optional[int] = None
    """Optimizer steps; null: epochs decides."""
    epochs: float = 1.0
    """Passes over the data, where max_steps is null."""
    global_batch_size: int = 8
    """Rows in one optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = 8
    """Most rows in one forward on a rank; gradients are accumulated over the others."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Dtype = Dtype.float32
    """Compute dtype of the draft; master weights, reductions and optimizer states are always float32."""
    ttt_chunk_slots: Optional[int] = None
    """Slots whose TTT steps are computed together, rounded up to 64: fewer need less memory; null: by the width."""
    compile: bool = False
    """Apply torch.compile to the draft layer after its attention, and to the target's MLPs."""
    timeout_seconds: float = 600.0
    """Seconds that a rank waits for others in a step; longer in evaluation, or if the backend may wait longer."""
    log_interval: int = 10
    """Steps between lines of metrics."""
    save_interval: int = 500
    """Steps between checkpoints; each is evaluated, and the best is kept."""
    save_minutes: Optional[float] = None
    """Minutes between checkpoints, for machines that can be preempted; null: save_interval alone."""
    async_save: bool = True
    """Continue training while a checkpoint is written."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, in addition to the best."""
    val_interval: int = 100
    """Steps between validation losses on held-out rows."""
    val_rows: int = 16
    """Held-out rows of a validation, from at most twice evaluation.num_questions conversations."""
    profile: bool = False
    """Write a torch profiler trace to <output_dir>/profile."""

    def __post_init__(self) -> None:
        require_positive(
            self, "trainer", "max_steps", "epochs", "global_batch_size", "micro_batch_size", "log_interval",
            "save_interval", "save_minutes", "timeout_seconds", "keep_checkpoints", "val_interval", "val_rows",
            "ttt_chunk_slots",
        )  # fmt: skip

    def slots(self, hidden_size: int, device_type: str) -> int:
        """Slots of one TTT chunk for a draft of width ``hidden_size``, by default the fewest that run at full speed."""
        return self.ttt_chunk_slots or max((1 << 25 if device_type == "cuda" else 1 << 17) // hidden_size, 1)

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run over ``num_rows`` packed rows."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.global_batch_size))


@dataclass
class LoggerConfig:
    """Logger of metrics in addition to the console and metrics.jsonl."""

    _target_: str = "nemo_speculative.training.metrics.no_logger"


@dataclass
class WandbConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.metrics.WandbLogger"
    project: str = "nemo_speculative"
    name: Optional[str] = None
    """Name of the run; null: chosen by wandb."""
    mode: WandbMode = WandbMode.offline
    """offline needs no account; upload later with `wandb sync`."""


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
        if self.data.answers is Answers.target and not self.backend.DECODES:
            raise UserError(
                "data.answers=target needs backend=hf, which alone decodes: answer the questions first, and train on "
                "them with data.answers=given"
            )
        if self.evaluation.rejection_sampling and self.exporter.topk > 1 and not self.evaluation.static_tree:
            raise UserError(
                f"evaluation.rejection_sampling is true and exporter.topk is {self.exporter.topk}: a dynamic tree "
                "keeps draft tokens for their score, so rejection sampling is not lossless; set exporter.topk=1"
            )

    def data_ranks(self, ranks: int) -> int:
        """The number of data-parallel ranks, of ``ranks`` processes; raises UserError if the work cannot be divided."""
        replicate, shard = self.parallelism.sizes(ranks)
        size, context = self.trainer.global_batch_size, self.parallelism.context
        shared = f" ({context} processes share each)" if context > 1 else ""
        if size % (replicate * shard):
            raise UserError(
                f"trainer.global_batch_size is {size}: it cannot be split evenly over {replicate * shard} ranks"
                f"{shared}; take a multiple of them"
            )
        return replicate * shard


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
        require_positive(self, "", "shard_mb")
        if isinstance(self.backend, FeaturesBackendConfig):
            raise UserError("backend=features reads what was captured: capture with backend=hf, sglang or remote")
        if self.merge and self.verify:
            raise UserError(f"merge is {self.merge} and verify is true: do one after the other")
