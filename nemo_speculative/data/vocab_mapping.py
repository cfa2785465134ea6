"""The draft vocabulary: the target ids that a draft can propose."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress, islice
from typing import TypeVar

import torch

from nemo_speculative.config.vocab_and_aux_layers import VocabularySize
from nemo_speculative.data.conversation import TokenRow

T = TypeVar("T")
ROWS_COUNTED_AT_ONCE = 256
"""A count is as long as the vocabulary, however few rows it is of."""
ENTRIES_MULTIPLE = 64
"""Matrix products are fastest where the head's rows are a multiple of it."""


@dataclass(frozen=True)
class VocabMapping:
    """``ids`` are the target ids in ascending order; draft id j stands for target id ``ids[j]``."""

    ids: torch.Tensor
    """int64 [V_d]."""
    target_size: int
    coverage: float
    """Share of the supervised tokens that lie inside, from 0 to 1."""

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def d2t(self) -> torch.Tensor:
        """int64 [V_d], an offset: target id = j + d2t[j]."""
        return self.ids - torch.arange(self.size)

    @property
    def t2d(self) -> torch.Tensor:
        """bool [V]: whether a target id lies inside."""
        inside = torch.zeros(self.target_size, dtype=torch.bool)
        inside[self.ids] = True
        return inside


def build_vocabulary(counts: torch.Tensor, size: VocabularySize) -> VocabMapping:
    """The ids that the assistant wrote most often; ties, and ids never seen, go to the lower id.

    Sorts the vocabulary once.

    Args:
        counts: int64 [V], how often it wrote each: see :func:`count_supervised`.
    """
    entries = size.entries if size.entries is not None else entries_for(counts, size.coverage)
    chosen = torch.sort(counts, descending=True, stable=True).indices[:entries].sort().values
    return VocabMapping(chosen, len(counts), coverage(counts, chosen))


def vocabulary_of(d2t: torch.Tensor, counts: torch.Tensor) -> VocabMapping:
    """The vocabulary that ``d2t`` int64 [V_d] describes, and what it covers of ``counts`` int64 [V]."""
    ids = torch.arange(len(d2t)) + d2t
    return VocabMapping(ids, len(counts), coverage(counts, ids))


def coverage(counts: torch.Tensor, ids: torch.Tensor) -> float:
    """The share of what is counted in int64 [V] that has one of ``ids``, from 0 to 1."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else 0.0


def count_supervised(rows: Iterable[TokenRow], target_size: int) -> torch.Tensor:
    """int64 [V]: how often each id was written by the assistant; linear in the tokens."""
    counts = torch.zeros(target_size, dtype=torch.long)
    for some in batched(rows, ROWS_COUNTED_AT_ONCE):
        ids = [i for row in some for i in compress(row.input_ids, row.loss_mask)]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=target_size)
    return counts


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, the last one shorter."""
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


def entries_for(counts: torch.Tensor, coverage: float) -> int:
    """The fewest ids that cover a share of the tokens counted in int64 [V], rounded up to a multiple of 64."""
    covered = counts.sort(descending=True).values.cumsum(0)
    fewest = int((covered < coverage * covered[-1]).sum()) + 1
    return min(-(-fewest // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE, len(counts))
