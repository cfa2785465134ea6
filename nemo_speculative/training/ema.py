"""The average of the weights over the steps, which is measured and exported in their place where it is kept."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

HEAD_START = 10
"""After n steps no more than (1 + n) / (10 + n) of the average stays."""


class WeightAverage:
    """Exponential moving average of a model's trainable weights: float32, sharded as they are.

    a ← d · a + (1 - d) · w after every optimizer step, with d = min(decay, (1 + n) / (10 + n)) at step n, so that the
    average soon forgets the weights it began with (the rule of TensorFlow's ``ExponentialMovingAverage``).  With
    ``decay=None`` nothing is kept, and nothing done.

    A ``Stateful`` of torch's distributed checkpoint, so that a resumed run averages on exactly.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        self.model, self.decay = model, decay or 0.0
        kept = [] if decay is None else [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._weights = dict(kept)
        self._averages = {name: p.detach().to(torch.float32, copy=True) for name, p in kept}

    @property
    def names(self) -> list[str]:
        """Of the parameters that are averaged."""
        return list(self._averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step ``step``, the first being 1."""
        kept = min(self.decay, (1 + step) / (HEAD_START + step))
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].float(), 1 - kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model's weights are the average; after it they are, bit for bit, what they were."""
        own = {name: p.detach().clone() for name, p in self._weights.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what a forward pass without a backward gathered is of the other weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages, by the parameters' names."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Puts averages back in place; raises KeyError where one is missing."""
        for name, average in self._averages.items():
            average.copy_(state[name])
