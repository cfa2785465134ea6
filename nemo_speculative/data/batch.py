"""Batches of packed rows, the one form in which tokens reach the target and the draft, and the loader that makes them.

Rows are packed again for each epoch and dealt out in global batches, which do not depend on the number of ranks and
micro-batches.  The only state is the number of rows consumed, so a run resumes exactly on any number of ranks.
"""

import bisect
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import to_device

WINDOW = 2048
"""Documents packed together: enough to fill rows, few enough to keep the shuffled order."""


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
        names = ("input_ids", "loss_mask", "positions", "documents")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
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


class PackedRows(Sequence[list[int]]):
    """The indices of the documents in each row, in four bytes for each document and each row."""

    def __init__(self) -> None:
        self._documents, self._ends = array("i"), array("i", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        if isinstance(at, range):
            return [self[i] for i in at]
        return self._documents[self._ends[at] : self._ends[at + 1]].tolist()

    def append(self, documents: Sequence[int]) -> None:
        self._documents.extend(documents)
        self._ends.append(len(self._documents))


def pack(lengths: Sequence[int], packed_length: int, seed: int) -> PackedRows:
    """Packs documents into rows: best-fit decreasing within windows of a shuffled order.

    A function of its arguments alone, so that every rank and every restart makes the same rows.

    Args:
        lengths: tokens of each document, at most ``packed_length``.

    Returns:
        Indices into ``lengths``, in the order in which they are trained on.
    """
    rng = random.Random(seed)
    order = array("i", range(len(lengths)))
    rng.shuffle(order)
    rows = PackedRows()
    for start in range(0, len(order), WINDOW):
        window = sorted(order[start : start + WINDOW], key=lambda i: (-lengths[i], i))
        packed = _best_fit(window, lengths, packed_length)
        rng.shuffle(packed)
        for row in packed:
            rows.append(row)
    return rows


def _best_fit(documents: list[int], lengths: Sequence[int], packed_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for document in documents:
        at = bisect.bisect_left(free, (lengths[document], -1))
        left, row = free.pop(at) if at < len(free) else (packed_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        bisect.insort(free, (left - lengths[document], row))
    return rows


def collate(
    rows: Sequence[Sequence[TokenRow]], packed_length: int, pad_id: int, epochs: Sequence[int] | None = None
) -> Batch:
    """Tensors of packed ``rows``, padded to ``packed_length``; ``epochs`` has the pass over the data of each row."""
    shape = (len(rows), packed_length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    positions, documents = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    spans = []
    for r, (row, epoch) in enumerate(zip(rows, epochs or [0] * len(rows), strict=True)):
        start = 0
        for d, document in enumerate(row):
            end = start + len(document.input_ids)
            input_ids[r, start:end] = torch.tensor(document.input_ids)
            loss_mask[r, start:end] = torch.tensor(document.loss_mask)
            positions[r, start:end] = torch.arange(end - start)
            documents[r, start:end] = d
            spans.append(Span(document.id, epoch, r, start, end))
            start = end
        positions[r, start:] = torch.arange(packed_length - start)
        documents[r, start:] = len(row)
    return Batch(input_ids, loss_mask, positions, documents, tuple(spans))


@dataclass(eq=False, kw_only=True)
class PackedLoader:
    """Endless global batches of ``global_batch_size`` rows, of which each rank gets its part as micro-batches."""

    dataset: TokenizedDataset = field(kw_only=False)
    packed_length: int
    global_batch_size: int
    micro_batch_size: int
    pad_id: int
    seed: int
    rank: int = 0
    world_size: int = 1
    rows_consumed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._epochs: dict[int, PackedRows] = {}
        self._epoch, self._epoch_start = 0, 0

    def rows_of(self, epoch: int) -> PackedRows:
        """The packed rows of an epoch; those of the last two epochs requested are cached."""
        if epoch not in self._epochs:
            self._epochs = {e: rows for e, rows in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = pack(self.dataset.lengths, self.packed_length, seed=self.seed * 1_000_003 + epoch)
        return self._epochs[epoch]

    @property
    def epoch(self) -> int:
        """Pass over the data that the next row belongs to, from 0."""
        self._row_at(self.rows_consumed)
        return self._epoch

    def _row_at(self, index: int) -> list[int]:
        """Row ``index`` of the endless sequence of epochs (indices never decrease)."""
        while index - self._epoch_start >= len(self.rows_of(self._epoch)):
            self._epoch_start += len(self.rows_of(self._epoch))
            self._epoch += 1
        return self.rows_of(self._epoch)[index - self._epoch_start]

    def next_global_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch: rows rank, rank + world_size, … of it."""
        indices = range(self.rows_consumed, self.rows_consumed + self.global_batch_size)
        rows = [(self._row_at(i), self._epoch) for i in indices][self.rank :: self.world_size]
        self.rows_consumed += self.global_batch_size
        batches = []
        for start in range(0, len(rows), self.micro_batch_size):
            packed, epochs = zip(*rows[start : start + self.micro_batch_size], strict=True)
            documents = [[self.dataset.rows[d] for d in row] for row in packed]
            batches.append(collate(documents, self.packed_length, self.pad_id, epochs))
        return batches

    def state_dict(self) -> dict[str, int]:
        return {"rows_consumed": self.rows_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows_consumed = state["rows_consumed"]
        self._epoch, self._epoch_start = 0, 0


def supervision_mask(
    loss_mask: torch.Tensor, documents: torch.Tensor, num_steps: int, convention: MaskConvention
) -> torch.Tensor:
    """The supervised slots of each step: bool [T, B, L] from ``loss_mask`` bool [B, L] and ``documents`` int64 [B, L].

    By default ("serving") slot t is supervised at step i when x_{t+1}, …, x_{t+2+i} are all the assistant's, in one
    document.  The other conventions reproduce published frameworks, for comparison:

    - official (SafeAILab/EAGLE, SpecForge): the mask is not shifted with label and token, m[t+i].  The first drafted
      token of an answer is never trained, two labels past its end are.
    - automodel (NeMo AutoModel): shifted by one, m[t+1+i].  One label past the end is trained.
    """
    same = [_ahead(documents, 2 + i, -1) == documents for i in range(num_steps)]
    if convention is not MaskConvention.serving:
        shift = 0 if convention is MaskConvention.official else 1
        return torch.stack([_ahead(loss_mask, shift + i, False) & same[i] for i in range(num_steps)])
    unbroken, steps = _ahead(loss_mask, 1, False), []
    for i in range(num_steps):
        unbroken = unbroken & _ahead(loss_mask, 2 + i, False) & same[i]
        steps.append(unbroken)
    return torch.stack(steps)


def _ahead(x: torch.Tensor, n: int, fill: int | bool) -> torch.Tensor:
    """y[:, t] = x[:, t + n], and ``fill`` past the end."""
    return pad(x[:, n:], (0, min(n, x.shape[1])), value=fill)
