"""The draft vocabulary: the target ids that a draft can propose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.shapes import VocabularySize

ENTRIES_MULTIPLE = 64
"""Matrix products are fastest where the head's rows are a multiple of it."""


@dataclass(frozen=True)
class DraftVocabulary:
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


def build_vocabulary(rows: Iterable[TokenRow], size: VocabularySize, target_size: int) -> DraftVocabulary:
    """The most frequent ids under the loss mask; ties, and ids never seen, go to the lower id.

    Linear in the tokens; sorts the vocabulary once.
    """
    counts = count_supervised(rows, target_size)
    entries = size.entries if size.entries is not None else entries_for(counts, size.coverage)
    chosen = torch.sort(counts, descending=True, stable=True).indices[:entries].sort().values
    return DraftVocabulary(chosen, target_size, _coverage(counts, chosen))


def vocabulary_of(d2t: torch.Tensor, rows: Iterable[TokenRow], target_size: int) -> DraftVocabulary:
    """The vocabulary that ``d2t`` int64 [V_d] describes, and what it covers of ``rows``."""
    ids = torch.arange(len(d2t)) + d2t
    return DraftVocabulary(ids, target_size, _coverage(count_supervised(rows, target_size), ids))


def _coverage(counts: torch.Tensor, ids: torch.Tensor) -> float:
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else 0.0


def count_supervised(rows: Iterable[TokenRow], target_size: int) -> torch.Tensor:
    """int64 [V]: how often each id was written by the assistant."""
    counts = torch.zeros(target_size, dtype=torch.long)
    for row in rows:
        supervised = torch.tensor(row.input_ids)[torch.tensor(row.loss_mask)]
        counts += torch.bincount(supervised, minlength=target_size)
    return counts


def entries_for(counts: torch.Tensor, coverage: float) -> int:
    """The fewest ids that cover a share of the tokens counted in int64 [V], rounded up to a multiple of 64."""
    covered = counts.sort(descending=True).values.cumsum(0)
    fewest = int((covered < coverage * covered[-1]).sum()) + 1
    return min(-(-fewest // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE, len(counts))
