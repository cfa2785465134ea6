"""The training loop, its parallelism and its loggers."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from nemo_speculative.config.schema.common import Dtype, require, require_positive

STATES_ALIVE = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Slots times width of one TTT chunk: the smallest that run at full speed. A slot stores about a hundred times its
width for the backward pass."""


class WandbMode(Enum):
    online = "online"
    offline = "offline"


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
            require(size == -1 or size > 0, f"parallelism.{name} is {size}: expected -1, or above 0")
        require_positive(self, "parallelism", "context")
        require(
            self.replicate != -1 or self.shard != -1,
            "parallelism.replicate and parallelism.shard are both -1: only one of them can be what the other leaves",
        )

    def sizes(self, ranks: int) -> tuple[int, int]:
        """``replicate`` and ``shard`` on ``ranks`` processes.

        Raises:
            UserError: the three sizes do not multiply to ``ranks``.
        """
        replicate, shard = self.replicate, self.shard
        if replicate == -1:
            replicate = ranks // (shard * self.context)
        if shard == -1:
            shard = ranks // (replicate * self.context)
        require(
            replicate * shard * self.context == ranks,
            f"parallelism: replicate={self.replicate}, shard={self.shard} and context={self.context} do not multiply "
            f"to the {ranks} process(es) that were started; start as many (torchrun --nproc-per-node; for "
            "plan=true write WORLD_SIZE=N before the command), or another parallelism (single, ddp, fsdp2, hsdp, cp)",
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
    """Slots whose TTT steps are computed together, rounded up to 64: fewer need less memory; null: by the draft's
    width."""
    compile: bool = False
    """Apply torch.compile to the draft layer after its attention, and to the target's MLPs."""
    timeout_seconds: float = 600.0
    """Seconds that a rank waits for the others in a step before it ends; longer during evaluation, and with a backend
    that may itself take longer."""
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
        """Slots of one TTT chunk, for a draft of width ``hidden_size``."""
        return self.ttt_chunk_slots or max(STATES_ALIVE[device_type] // hidden_size, 1)

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run over ``num_rows`` packed rows."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.global_batch_size))


@dataclass
class LoggerConfig:
    """Logger of metrics in addition to the console and metrics.jsonl."""

    _target_: str = "nemo_speculative.training.metrics.no_logger"


@dataclass
class TensorBoardConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.metrics.tensorboard"


@dataclass
class WandbConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.metrics.WandbLogger"
    project: str = "nemo_speculative"
    name: Optional[str] = None
    """Name of the run; null: chosen by wandb."""
    mode: WandbMode = WandbMode.offline
    """offline needs no account; upload later with `wandb sync`."""
