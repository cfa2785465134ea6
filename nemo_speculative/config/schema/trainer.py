"""The loop of training: its steps, its processes, and where its metrics go."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from nemo_speculative.config.schema.common import Dtype, require, require_positive

STATES_ALIVE = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Slots times width: as few as run at full speed.  A slot keeps some hundred times its width for its gradient."""


class WandbMode(Enum):
    online = "online"
    offline = "offline"


@dataclass
class ParallelismConfig:
    """How a draft is trained by the processes that a launcher starts: replicate * shard * context of them."""

    replicate: int = 1
    """Groups of ranks that each hold a whole draft; -1: as many as the others leave (DDP, HSDP)."""
    shard: int = 1
    """Ranks that share one draft, and each train on rows of their own; -1: as many as the others leave (FSDP2)."""
    context: int = 1
    """Ranks that share a row, and one draft: each computes a part of the positions (context parallelism)."""
    offload: bool = False
    """Keep the draft's float32 weights and the optimizer's states in the host's memory, and step there."""

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
        """``replicate`` and ``shard`` on so many processes.

        Raises:
            ConfigError: they do not multiply to them.
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
    """Optimizer steps; null: as many as epochs asks for."""
    epochs: float = 1.0
    """Passes over the data, where max_steps is null."""
    global_batch_size: int = 8
    """Rows in one optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = 8
    """At most so many rows in one forward; the rest is accumulated."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Dtype = Dtype.float32
    """What the draft computes in; its master weights, reductions and optimizer are float32 always."""
    ttt_chunk_slots: Optional[int] = None
    """Slots whose unroll is alive at once, rounded up to 64; fewer take less memory; null: by the draft's width."""
    compile: bool = False
    """torch.compile the draft layer behind its attention (output projection, norm, MLP), and the target's MLPs."""
    timeout_seconds: float = 600.0
    """How long a rank waits for the others within a step before it ends; longer while a checkpoint is measured, and
    where the backend's own waits are longer."""
    log_interval: int = 10
    """Steps between two lines of metrics."""
    save_interval: int = 500
    """Steps between two checkpoints; each is measured with the decoder, and the best kept."""
    save_minutes: Optional[float] = None
    """Minutes after which another checkpoint is written, for machines that may be taken away; null: by steps alone."""
    async_save: bool = True
    """Go on training while a checkpoint is written; false: wait for it."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best."""
    val_interval: int = 100
    """Steps between two losses on held-out rows."""
    val_rows: int = 16
    """Held-out rows in one validation, of twice as many conversations at most as evaluation asks questions."""
    profile: bool = False
    """Write a torch profiler trace to <output_dir>/profile."""

    def __post_init__(self) -> None:
        require_positive(
            self, "trainer", "max_steps", "epochs", "global_batch_size", "micro_batch_size", "log_interval",
            "save_interval", "save_minutes", "timeout_seconds", "keep_checkpoints", "val_interval", "val_rows",
            "ttt_chunk_slots",
        )  # fmt: skip

    def slots(self, hidden_size: int, device_type: str) -> int:
        """Slots at once, for a draft of width ``hidden_size``."""
        return self.ttt_chunk_slots or max(STATES_ALIVE[device_type] // hidden_size, 1)

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run over ``num_rows`` packed rows."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.global_batch_size))


@dataclass
class LoggerConfig:
    """Where metrics go beside the console and metrics.jsonl."""

    _target_: str = "nemo_speculative.training.metrics.no_logger"


@dataclass
class TensorBoardConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.metrics.tensorboard"


@dataclass
class WandbConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.metrics.WandbLogger"
    project: str = "nemo_speculative"
    name: Optional[str] = None
    """The run's name; null: wandb's own choice."""
    mode: WandbMode = WandbMode.offline
    """offline needs no account; upload later with `wandb sync`."""
