"""The optimizers and the learning-rate schedule."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive


class DecayType(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"


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
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas is {self.betas}: expected two numbers of at least 0 and below 1",
        )
        require_not_negative(self, "optimizer", "weight_decay")
        for name in ("warmup_ratio", "decay_ratio", "min_lr_factor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} is {value}: expected a share between 0 and 1")
        require(
            self.decay_type is not DecayType.constant or self.min_lr_factor == 0,
            f"optimizer.min_lr_factor is {self.min_lr_factor}, and optimizer.decay_type=constant has no decay: "
            "leave out one of them",
        )
        require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}: expected at least 0 and below 1, e.g. 0.999, or null",
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
        require(
            0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: expected at least 0 and below 1, e.g. 0.95"
        )
