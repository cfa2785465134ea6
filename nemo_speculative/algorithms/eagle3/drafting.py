"""Drafting with an EAGLE-3 draft (2503.01840, section 3.1).

At verified positions the draft reads the projection of the target's aux states, after them its own outputs.
"""

import torch

from nemo_speculative.algorithms.common.attention import Pair
from nemo_speculative.algorithms.common.drafting import DraftSession


class Eagle3Session(DraftSession):
    """The drafting of an :class:`.network.Eagle3Draft`."""

    def first_layer_input(self, embeddings: torch.Tensor, feature: torch.Tensor) -> Pair:
        first = self.draft.decoder_layers[0]
        return torch.cat((first.input_layernorm(embeddings), first.hidden_norm(feature)), dim=-1), feature
