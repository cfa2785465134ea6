"""Which of a document's positions a loss reads, and the name by which a document's features are found.

A slot t reads the features at or before t of its document, and its labels are the target's outputs at t + 1, t + 2, ….
Behind the last supervised slot nothing is read, so nothing is stored.  The number of steps of the unroll does not
matter: its later labels are those of later slots' first step (tests/targets/cached/test_positions.py proves it for
every mask convention).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from xxhash import xxh3_128_digest

from nemo_speculative.algorithms.common.supervision_mask import supervision_mask
from nemo_speculative.config.schema import MaskConvention

KEY_BYTES = 16


@dataclass(frozen=True)
class Positions:
    """Of one document."""

    attended: int
    """Positions 0 to this one, exclusive, are read as features."""
    labels: torch.Tensor
    """int64 [m], ascending: whose outputs are labels."""

    @classmethod
    def of(cls, loss_mask: torch.Tensor, convention: MaskConvention) -> "Positions":
        """Of a document's ``loss_mask``, bool [L]."""
        row = loss_mask[None]
        slots = supervision_mask(row, torch.zeros_like(row, dtype=torch.long), 1, convention)[0, 0].nonzero()[:, 0]
        return cls(int(slots[-1]) + 1 if len(slots) else 0, slots + 1)


def key_of(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> bytes:
    """The name of a document, by its content: int64 [L] and bool [L] → 16 bytes."""
    return xxh3_128_digest(input_ids.numpy().tobytes() + loss_mask.numpy().tobytes())


def key_of_lists(input_ids: Sequence[int], loss_mask: Sequence[bool]) -> bytes:
    """The same of a row that is no tensor yet."""
    return key_of(torch.tensor(input_ids, dtype=torch.long), torch.tensor(loss_mask, dtype=torch.bool))
