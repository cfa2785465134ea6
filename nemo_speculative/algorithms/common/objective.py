"""What a trainer asks of an objective."""

from typing import Any, NamedTuple, Protocol

import torch

from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput


class LossSum(NamedTuple):
    """A loss whose gradients add up over micro-batches and ranks, and the sums behind the metrics.

    A tuple, because FSDP2 looks for the tensors of an output where pytrees have them: before torch 2.13 it finds none
    in a dataclass, and then reduces no gradient.
    """

    loss: torch.Tensor
    """Scalar: this micro-batch's part of the global batch's loss."""
    sums: dict[str, torch.Tensor]
    """Numerators and denominators, [T] each, to be added over micro-batches and ranks."""


class Objective(Protocol):
    """A training objective: who is supervised, and what it costs."""

    def schedule(self, batch: Batch, device: torch.device, training: bool = True) -> Any:
        """What a step computes of ``batch``, which is on the host; its ``batch`` is on ``device``.

        Its ``counts``, float64 [T] on the host, say what the supervised slots weigh at each step.
        """
        ...

    def loss(self, draft: Any, schedule: Any, supervision: TargetOutput, counts: torch.Tensor) -> LossSum:
        """``counts`` are those of the global batch: all ranks, all micro-batches."""
        ...

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics from sums over the global batch."""
        ...
