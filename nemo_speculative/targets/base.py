"""The interface of the frozen target model of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.context_parallel import ContextShard


@dataclass(frozen=True)
class TargetOutput:
    """The target's hidden states for a batch of B rows of L tokens; for a context shard of m tokens B is 1, L is m."""

    aux_hidden_states: torch.Tensor
    """[B, L, A * h]: outputs of the A aux layers, lowest layer first."""
    last_hidden_state: torch.Tensor
    """[B, L, h]: output of the final norm, so that ``logits(last_hidden_state)`` predicts the next token."""

    def shard(self, shard: ContextShard) -> "TargetOutput":
        """The tokens of ``shard``, of the output for a whole batch."""
        return TargetOutput(shard.local(self.aux_hidden_states), shard.local(self.last_hidden_state))


class Target(Protocol):
    """A frozen target model, as ``backend=`` chooses it.

    To add one, write a file here with a subclass of :class:`.embedding_and_head.EmbeddingAndHead`, which loads
    configuration, tokenizer, embedding, norm and head, and implements everything below but
    :meth:`compute_hidden_states`.  That method takes packed rows and must keep their documents apart: the states of a
    document are those that it has alone.  It returns the tokens of ``batch.shard`` only, on ``device``, in ``dtype``.
    Set ``requests_ahead`` if the class waits for something else than this process's device, and ``collective`` if ranks
    compute together.  Constructor arguments beyond those of ``EmbeddingAndHead`` are the fields of a dataclass in
    config/schema/model.py, whose ``_target_`` names the class, plus a YAML in conf/backend/.  hf.py is the example to
    read; a test of a new target compares it with :class:`.hf.HFTarget`.  Logits are never part of the output: losses
    compute those that they need from the head.
    """

    path: Path
    config: Any
    """The model's transformers configuration (its text part)."""
    tokenizer: Any
    stop_ids: frozenset[int]
    """Token ids that end an answer."""
    aux_layers: list[int]
    device: torch.device
    requests_ahead: int
    """Number of batches that may be requested ahead, in threads; 0 if this process's own device computes them."""

    collective: bool
    """Whether all ranks take part in each call, so that they must call equally often, in one order with their other
    collectives."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states and of the head."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the target's weights."""
        ...

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Called once, before training, with all documents that will be requested.

        Raises:
            UserError: the target has no hidden states for one of them.
        """
        ...

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """The hidden states of this rank's tokens, ``batch.shard``."""
        ...

    def close(self) -> None:
        """Called at the end of the run, also after an error."""
        ...

    def compile(self) -> None:
        """Compiles the parts of :meth:`compute_hidden_states` that can be compiled."""
        ...

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], through the frozen embedding."""
        ...

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], through the frozen head."""
        ...

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: weight of the frozen head."""
        ...

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm in front of the head, if the decoder has one under its usual name."""
        ...

    def last_layers(self, count: int) -> Sequence[nn.Module]:
        """The last ``count`` decoder layers, or all if there are fewer."""
        ...
