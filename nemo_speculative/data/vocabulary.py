"""The draft vocabulary: the target ids that a draft can propose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nemo_speculative.data.conversations import TokenRow


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


def build_vocabulary(rows: Iterable[TokenRow], size: int, target_size: int) -> DraftVocabulary:
    """The ``size`` most frequent ids under the loss mask; ties, and ids never seen, go to the lower id.

    Linear in the tokens; sorts the vocabulary once.
    """
    counts = torch.zeros(target_size, dtype=torch.long)
    for row in rows:
        supervised = torch.tensor(row.input_ids)[torch.tensor(row.loss_mask)]
        counts += torch.bincount(supervised, minlength=target_size)
    chosen = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    total = int(counts.sum())
    return DraftVocabulary(chosen, target_size, int(counts[chosen].sum()) / total if total else 0.0)
