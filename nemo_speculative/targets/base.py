"""What a draft learns from: the frozen target, behind one protocol."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_speculative.data.batch import Batch
from nemo_speculative.errors import UserError


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

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], from the frozen embedding."""
        ...

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], through the frozen head."""
        ...


def aux_layers_for(num_layers: int, chosen: list[int] | None) -> list[int]:
    """The aux layers of a target of ``num_layers`` decoder layers.

    ``chosen``, or the published formula [1, N//2 - 1, N - 4] (EAGLE-3, algorithm as released; 0-based outputs).

    Raises:
        UserError: a layer is out of range, or the formula gives the same layer twice (fewer than 7 layers).
    """
    if chosen is None:
        layers = [1, num_layers // 2 - 1, num_layers - 4]
        if len(set(layers)) < 3 or min(layers) < 0 or layers != sorted(layers):
            raise UserError(
                f"the target has {num_layers} layers, too few for the default aux layers [1, N//2 - 1, N - 4] = "
                f"{layers}; list them, e.g. draft.aux_layers={_spread(num_layers)}"
            )
        return layers
    # The output of the last layer is not captured by SGLang (it reads layer inputs).
    wrong = [layer for layer in chosen if not 0 <= layer < num_layers - 1]
    if wrong:
        raise UserError(
            f"draft.aux_layers holds {wrong[0]}: the target has {num_layers} layers, so 0 to {num_layers - 2} can be "
            "captured"
        )
    return list(chosen)


def _spread(num_layers: int) -> list[int]:
    return sorted({0, max(num_layers // 2 - 1, 0), max(num_layers - 2, 0)})
