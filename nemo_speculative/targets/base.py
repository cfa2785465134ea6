"""What a draft learns from: the frozen target, behind one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.distributed.context_parallel import ContextShard


@dataclass(frozen=True)
class TargetOutput:
    """What the target computed for a batch of B rows of L tokens; of a share of m of them, B is 1 and L is m."""

    aux_hidden_states: torch.Tensor
    """[B, L, A * h]: outputs of the A aux layers, lowest first."""
    last_hidden_state: torch.Tensor
    """[B, L, h]: after the final norm, so that ``logits(last_hidden_state)`` predicts the next token."""

    def of(self, shard: ContextShard) -> "TargetOutput":
        """The share of what was computed for a whole batch."""
        return TargetOutput(shard.local(self.aux_hidden_states), shard.local(self.last_hidden_state))


class Target(Protocol):
    """A frozen target model.  Logits are never part of the supervision: the loss derives what it needs."""

    path: Path
    config: Any
    """The model's transformers configuration (the text part of it)."""
    tokenizer: Any
    stop_ids: frozenset[int]
    """The ids that end an answer."""
    aux_layers: list[int]
    device: torch.device
    requests_ahead: int
    """How many batches it may be asked for beforehand, in threads, as it only waits for what computes them; 0: none."""

    collective: bool
    """Whether all ranks compute what one asks for, so that each must ask equally often, in one order with whatever
    else they exchange."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its states and its head."""
        ...

    @property
    def fingerprint(self) -> str:
        """Tells one target's weights from another's."""
        ...

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Told once what it will be asked for.

        Raises:
            UserError: there is what it cannot supervise.
        """
        ...

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """Of the batch's share."""
        ...

    def close(self) -> None:
        """The run is at its end, whatever ended it."""
        ...

    def compile(self) -> None:
        """Compiles what it can of :meth:`compute_hidden_states`."""
        ...

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], from the frozen embedding."""
        ...

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], through the frozen head."""
        ...

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: the rows of the frozen head."""
        ...

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm in front of the head, where the decoder has one under its usual name."""
        ...

    def last_layers(self, count: int) -> Sequence[nn.Module]:
        """The last decoder layers, as many as there are up to ``count``."""
        ...
