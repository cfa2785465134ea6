"""The EAGLE-3 objective (2503.01840): a loss between distributions at every step of the unroll.

The label of slot t at step i is the target's distribution of x_{t+2+i}, restricted to the draft vocabulary and
renormalized.  A slot whose target argmax is not in the draft vocabulary carries no loss at that step, but is
counted, and counts as incorrect in every accuracy and in τ.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hydra.utils import instantiate

from nemo_speculative.algorithms.common.losses import Loss, RowLosses, upcast
from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft


class Eagle3Objective(TTTObjective):
    """The EAGLE-3 objective with a loss of :mod:`nemo_speculative.algorithms.common.losses`."""

    def __init__(self, target: Any, config: Any, **options: Any):
        super().__init__(target, config, **options)
        self.loss_function: Loss = instantiate(dataclasses.asdict(config.loss))

    @torch.no_grad()
    def labels(self, draft: Eagle3Draft, last_hidden_state: torch.Tensor) -> Sequence[torch.Tensor]:
        """Probabilities float32 [P, V_d], whether the target's argmax is in the draft vocabulary, and that argmax."""
        logits = self.target.logits(last_hidden_state)
        best = logits.argmax(-1)
        return upcast(logits.index_select(1, draft.draft_ids)).softmax(-1), draft.t2d[best], best

    def row_losses(
        self, draft: Eagle3Draft, logits: torch.Tensor, labels: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> RowLosses:
        probabilities, inside, best = labels
        choice = logits.argmax(-1)
        losses, gradient = self.loss_function.with_gradient(logits, probabilities, weight * inside, choice)
        return RowLosses({"loss": losses * inside}, draft.draft_ids[choice] == best, gradient)
