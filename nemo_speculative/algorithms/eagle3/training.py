"""The EAGLE-3 objective (2503.01840): a loss between distributions at every step of the unroll.

The label of slot t at step i is the target's distribution of x_{t+2+i}, restricted to the draft vocabulary and
renormalised.  A slot whose target argmax lies outside the draft vocabulary carries no loss at that step, but is
counted, and is a miss in every accuracy and in τ.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate

from nemo_speculative.algorithms.common.linear_loss import Judge, Judged
from nemo_speculative.algorithms.common.losses import Loss, SoftCrossEntropy
from nemo_speculative.algorithms.common.schedule import Rows
from nemo_speculative.algorithms.common.unroll_objective import UnrollObjective
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft


@dataclass(frozen=True)
class Labels:
    """The target's view of some positions."""

    probabilities: torch.Tensor
    """float32 [P, V_d]: of the draft vocabulary alone, each row summing to 1."""
    inside: torch.Tensor
    """bool [P]: the target's argmax lies in the draft vocabulary."""
    best: torch.Tensor
    """int64 [P]: the target's argmax, a target id."""


class Eagle3Objective(UnrollObjective):
    """See the module's text; ``loss`` is one of :mod:`nemo_speculative.algorithms.common.losses`."""

    def __init__(self, target: Any, *, loss: Loss | None = None, **unroll: Any):
        super().__init__(target, **unroll)
        self.distance = loss or SoftCrossEntropy()

    @classmethod
    def own_settings(cls, config: Any) -> dict[str, Any]:
        return {"loss": instantiate(dataclasses.asdict(config.loss))}

    def judge(self, draft: Any, last_hidden_state: torch.Tensor, rows: Rows, weight: torch.Tensor) -> Judge:
        return _Eagle3Judge(self, draft, last_hidden_state, rows, weight)

    @torch.no_grad()
    def labels(self, draft: Eagle3Draft, hidden: torch.Tensor) -> Labels:
        """From the target's last hidden states [P, h]."""
        logits = self.target.logits(hidden)
        best = logits.argmax(-1)
        return Labels(logits.index_select(1, draft.draft_ids).float().softmax(-1), draft.t2d[best], best)


@dataclass
class _Eagle3Judge:
    objective: Eagle3Objective
    draft: Eagle3Draft
    last_hidden_state: torch.Tensor
    rows: Rows
    weight: torch.Tensor

    def labels(self, span: slice) -> tuple[Labels, int]:
        hidden = self.last_hidden_state.index_select(0, self.rows.labels[span])
        return self.objective.labels(self.draft, hidden), span.start

    def judge(self, logits: torch.Tensor, labels: tuple[Labels, int], part: slice) -> Judged:
        found, start = labels
        of_row = self.rows.label[part] - start
        choice, inside = logits.argmax(-1), found.inside[of_row]
        p = found.probabilities.index_select(0, of_row)
        losses, gradient = self.objective.distance.with_gradient(logits, p, self.weight[part] * inside, choice)
        return Judged({"loss": losses * inside}, self.draft.draft_ids[choice] == found.best[of_row], gradient)
