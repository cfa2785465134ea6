"""The EAGLE-3 objective (2503.01840): a loss between distributions at every step of the unroll.

The label of slot t at step i is the target's distribution of x_{t+2+i}, restricted to the draft vocabulary and
renormalised.  A slot whose target argmax lies outside the draft vocabulary carries no loss at that step, but is
counted, and is a miss in every accuracy and in τ.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate

from nemo_speculative.drafts.eagle3 import Eagle3Draft
from nemo_speculative.objectives.losses import SoftCrossEntropy
from nemo_speculative.objectives.slots import Slots, rounded_indices
from nemo_speculative.objectives.unroll import Rows, StepLoss, UnrollObjective, flat_positions
from nemo_speculative.targets.base import Supervision

LABEL_CHUNK = 1024
"""Rows of target logits [rows, V] alive at once."""


@dataclass(frozen=True)
class Labels:
    """The target's view of the P positions that any slot predicts from."""

    row_of: torch.Tensor
    """int64 [B * L]: where a position's labels are (anything where it has none)."""
    probabilities: torch.Tensor
    """float32 [P, V_d]: of the draft vocabulary alone, each row summing to 1.  P is rounded up."""
    inside: torch.Tensor
    """bool [P]: the target's argmax lies in the draft vocabulary."""
    best: torch.Tensor
    """int64 [P]: the target's argmax, a target id."""


class Eagle3Objective(UnrollObjective):
    """See the module's text.

    Args:
        loss: logits [N, V_d] and the target's probabilities float32 [N, V_d] → float32 [N].
    """

    def __init__(self, target: Any, *, loss: Callable[..., torch.Tensor] | None = None, **unroll: Any):
        super().__init__(target, **unroll)
        self.distance = loss or SoftCrossEntropy()

    @classmethod
    def own_settings(cls, config: Any, seed: int) -> dict[str, Any]:
        return {"loss": instantiate(dataclasses.asdict(config.loss))}

    def step(self, draft: Eagle3Draft, outputs: torch.Tensor, labels: Labels, rows: Rows) -> StepLoss:
        logits, label = draft.logits(outputs), labels.row_of[rows.positions]
        weight = rows.weight * labels.inside[label]
        loss = (self.distance(logits, labels.probabilities[label]) * weight).sum()
        return StepLoss({"loss": loss}, draft.draft_ids[logits.argmax(-1)] == labels.best[label])

    @torch.no_grad()
    def labels(self, draft: Eagle3Draft, supervision: Supervision, slots: Slots) -> Labels:
        flat = supervision.last_hidden.flatten(0, 1)
        row_of, needed = self._positions(slots, flat)
        rows, ids = flat[needed], draft.draft_ids
        probabilities = torch.empty(len(rows), len(ids), dtype=torch.float32, device=flat.device)
        best = torch.empty(len(rows), dtype=torch.long, device=flat.device)
        for start in range(0, len(rows), LABEL_CHUNK):
            chunk = slice(start, start + LABEL_CHUNK)
            logits = self.target.logits(rows[chunk]).float()
            best[chunk] = logits.argmax(-1)
            probabilities[chunk] = logits[:, ids].softmax(-1)
        return Labels(row_of, probabilities, draft.t2d[best], best)

    def _positions(self, slots: Slots, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the labels of each position will be, and the positions that have any."""
        needed = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        length = len(flat) // len(slots.index)
        for i in range(self.num_steps):
            needed[flat_positions(slots, 1 + i, length)[slots.supervised[i].flatten()]] = True
        return needed.cumsum(0) - 1, rounded_indices(needed)[0]
