"""Drafting with an EAGLE-1 or EAGLE-2 draft: feature autoregression (2401.15077, section 4.1).

At verified positions it reads the target's last hidden state, after them its own prediction of it.
"""

import torch

from nemo_speculative.algorithms.common.attention import Pair
from nemo_speculative.algorithms.common.drafting import DraftSession


class EagleSession(DraftSession):
    """The drafting of an :class:`.network.EagleDraft`."""

    def first_layer_input(self, embeddings: torch.Tensor, feature: torch.Tensor) -> Pair:
        x = self.draft.fc(torch.cat((embeddings, feature), dim=-1))
        return x, x
