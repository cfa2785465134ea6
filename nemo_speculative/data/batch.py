"""The one shape in which tokens travel from the data to the target and the draft."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import send


@dataclass(frozen=True)
class Span:
    """Where a conversation lies: tokens ``start`` to ``end`` of ``row``."""

    id: str
    epoch: int
    """Which pass over the data this is."""
    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """Packed rows.  B rows of L tokens; a row holds whole documents one after the other, then padding."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    loss_mask: torch.Tensor
    """bool [B, L]: written by the assistant."""
    positions: torch.Tensor
    """int64 [B, L]: from 0 in every document."""
    documents: torch.Tensor
    """int64 [B, L]: which document of the row; padding has a number of its own."""
    spans: tuple[Span, ...] = ()
    """The conversations in it."""
    host: "Batch | None" = None
    """The same on the host, where it was before it travelled; None: it did not."""
    shard: ContextShard = FULL_BATCH
    """Which of the tokens this rank computes."""

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {k: send(getattr(self, k), device) for k in _TENSORS}
        return replace(self, **moved, host=None if device.type == "cpu" else self.host or self)

    @property
    def on_host(self) -> "Batch":
        """This one where it can be read without waiting for a device."""
        return self.host or self

    @property
    def whole(self) -> "Batch":
        """The same with all of its tokens on this rank."""
        return self if self.shard is FULL_BATCH else replace(self, shard=FULL_BATCH)

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of the conversations."""
        return tuple(span.id for span in self.spans)

    def document_lengths(self) -> list[int]:
        """Tokens of each document, padding being one of its own, row after row; they sum up to ``num_tokens``.

        Known without a look at the tensors, which may be on a device, where there are ``spans``.
        """
        length = self.input_ids.shape[1]
        if self.spans:
            starts = {row * length for row in range(len(self.input_ids))}
            starts |= {span.row * length + at for span in self.spans for at in (span.start, span.end)}
            edges = sorted(starts | {self.num_tokens})
        else:
            edges = [*(self.on_host.positions == 0).flatten().nonzero()[:, 0].tolist(), self.num_tokens]
        return [end - start for start, end in pairwise(edges)]

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, padding included."""
        return self.input_ids.numel()


_TENSORS = ("input_ids", "loss_mask", "positions", "documents")
