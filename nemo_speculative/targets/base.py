"""What a draft learns from: the frozen target, behind one protocol."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_speculative.data.batch import Batch


@dataclass(frozen=True)
class Supervision:
    """What the target computed for a batch of B rows of L tokens."""

    aux: torch.Tensor
    """[B, L, A * h]: outputs of the A aux layers, lowest first."""
    last_hidden: torch.Tensor
    """[B, L, h]: after the final norm, so that ``logits(last_hidden)`` predicts the next token."""


class Target(Protocol):
    """A frozen target model.  Logits are never part of the supervision: the loss derives what it needs."""

    config: Any
    """The model's transformers configuration (the text part of it)."""
    tokenizer: Any
    aux_layers: list[int]
    device: torch.device

    def supervise(self, batch: Batch) -> Supervision: ...

    def compile(self) -> None:
        """Compiles what it can of :meth:`supervise`."""
        ...

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], from the frozen embedding."""
        ...

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], through the frozen head."""
        ...
