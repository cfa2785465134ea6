"""Packing of documents (tokenized conversations) into rows of a fixed length."""

import bisect
import random
from array import array
from collections.abc import Sequence

import torch

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.data.conversations import Indexed, TokenRow

WINDOW = 2048
"""Documents packed together: enough to fill rows, few enough to keep the shuffled order."""


class PackedRows(Indexed[list[int]]):
    """The indices of the documents in each row; takes four bytes for each document and each row."""

    def __init__(self) -> None:
        self._documents, self._ends = array("i"), array("i", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _item(self, index: int) -> list[int]:
        return self._documents[self._ends[index] : self._ends[index + 1]].tolist()

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
