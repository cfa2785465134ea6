"""The interface of an implementation to measure, and the training step that all trainers share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from benchmarks.training_step.case import Setup

LEARNING_RATE, CLIP_NORM = 1e-4, 0.5


class Implementation(ABC):
    """A computation over the conversations of a :class:`Setup`, built with ``(setup, variants)``."""

    packages: Sequence[str] = ()
    """Packages whose versions are reported."""

    def __init__(self) -> None:
        self.resources = ExitStack()
        """Closed by :meth:`close`."""
        self.batches: list[Any] = []
        """Batches of one pass, one per step, in the implementation's own form."""

    @abstractmethod
    def step(self, batch: Any) -> float | None:
        """Runs the computation to measure on one of ``batches``; returns its loss, if any."""

    def close(self) -> None:
        self.resources.close()


class Trainer(Implementation):
    """A training step: a subclass computes the loss, this class runs backward, clipping and AdamW."""

    optimizer: Any

    def train(self, parameters: Iterable[nn.Parameter], fused: bool | None = None) -> None:
        """Creates the optimizer of ``parameters``; ``fused``: with torch's fused kernel (None: torch decides)."""
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)

    @abstractmethod
    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, a scalar with its autograd graph."""

    def step(self, batch: Any) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> None:
    """Copies ``weights`` into ``module``, after replacing the first matching prefix of each name by its value.

    Raises:
        KeyError: ``module`` has no parameter of that name.
    """
    parameters = dict(module.named_parameters())
    for name, weight in weights.items():
        prefix = next((old for old in prefixes if name.startswith(old)), "")
        parameters[prefixes.get(prefix, "") + name.removeprefix(prefix)].copy_(weight)


def padded_batches(setup: Setup) -> list[dict[str, torch.Tensor]]:
    """Batches of one conversation per row, padded: int64 [B, L] ``input_ids``, ``attention_mask``, ``loss_mask``."""
    size = setup.case.size
    chunks = [setup.conversations[i : i + size.rows] for i in range(0, len(setup.conversations), size.rows)]
    return [_padded(chunk, size.row_tokens) for chunk in chunks]


def _padded(conversations: Sequence[Any], row_tokens: int) -> dict[str, torch.Tensor]:
    shape = (len(conversations), row_tokens)
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "loss_mask")}
    for r, conversation in enumerate(conversations):
        n = len(conversation)
        batch["input_ids"][r, :n] = conversation.input_ids
        batch["attention_mask"][r, :n] = 1
        batch["loss_mask"][r, :n] = conversation.loss_mask
    return batch
