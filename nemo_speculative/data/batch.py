"""A batch of packed rows: the one form in which tokens reach the target and the draft."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import to_device


@dataclass(frozen=True)
class Span:
    """The place of a conversation: tokens ``start`` to ``end`` of ``row``."""

    id: str
    epoch: int
    """Pass over the data, from 0."""
    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """B packed rows of L tokens; a row holds whole documents (tokenized conversations), then padding."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    loss_mask: torch.Tensor
    """bool [B, L]: the assistant wrote the token."""
    positions: torch.Tensor
    """int64 [B, L]: position ids, from 0 in every document."""
    documents: torch.Tensor
    """int64 [B, L]: index of the document within its row; padding has an index of its own."""
    spans: tuple[Span, ...] = ()
    """The conversations in the batch."""
    host: "Batch | None" = None
    """The batch on the host that this one was copied from; None: this one is on the host."""
    shard: ContextShard = FULL_BATCH
    """The tokens that this context-parallel rank computes."""

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {k: to_device(getattr(self, k), device) for k in _TENSORS}
        return replace(self, **moved, host=None if device.type == "cpu" else self.host or self)

    @property
    def on_host(self) -> "Batch":
        """The batch on the host, which can be read without waiting for a device."""
        return self.host or self

    @property
    def whole(self) -> "Batch":
        """The same batch with all tokens on this rank."""
        return self if self.shard is FULL_BATCH else replace(self, shard=FULL_BATCH)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the conversations."""
        return tuple(span.id for span in self.spans)

    def document_lengths(self) -> list[int]:
        """Tokens of each document, row after row; the padding of a row counts as one.  They sum to ``num_tokens``.

        Where there are ``spans``, the tensors, which may be on a device, are not read.
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
        """B * L, padding included."""
        return self.input_ids.numel()


_TENSORS = ("input_ids", "loss_mask", "positions", "documents")
