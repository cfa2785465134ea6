"""What a trainer asks of an objective."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import Supervision


@dataclass(frozen=True)
class LossSum:
    """A loss whose gradients add up over micro-batches and ranks, and the sums behind the metrics."""

    loss: torch.Tensor
    """Scalar: this micro-batch's part of the global batch's loss."""
    sums: dict[str, torch.Tensor]
    """Numerators and denominators, [T] each, to be added over micro-batches and ranks."""


class Objective(Protocol):
    """A training objective: who is supervised, and what it costs."""

    def counts(self, batch: Batch) -> torch.Tensor:
        """float64 [T]: supervised slots at each step, known before any model runs."""
        ...

    def loss(self, draft: Any, batch: Batch, supervision: Supervision, counts: torch.Tensor) -> LossSum:
        """``counts`` are those of the global batch: all ranks, all micro-batches."""
        ...

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics from sums over the global batch."""
        ...
