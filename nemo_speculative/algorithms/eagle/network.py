"""The EAGLE-1 and EAGLE-2 draft network (2401.15077): feature autoregression under the target's own head.

Notable choices:
- fc reads [embedding ; feature] and has a bias, which a server always builds;
- the first layer has no input norm, and there is no final norm: the output is a prediction of the target's last
  hidden state, after its final norm;
- embedding and head are the target's, frozen, and not part of the checkpoint.
EAGLE-2 is the same network; its tree belongs to decoding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.contract import numbers_for
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.layers import DraftLayer
from nemo_speculative.algorithms.eagle.contract import EagleShape

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig


class EagleDraft(Draft):
    """An EAGLE-1 or EAGLE-2 draft."""

    ARCHITECTURE = "LlamaForCausalLMEagle"

    def __init__(self, shape: EagleShape):
        super().__init__(shape)
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=True)
        self.layers = nn.ModuleList(
            DraftLayer(shape, shape.hidden_size, "input_layernorm" if n else None) for n in range(shape.num_layers)
        )

    @classmethod
    def shape_for(
        cls, config: "DraftConfig | None", target_config: Any, aux_layers: Sequence[int] = (),
        vocabulary_size: int | None = None,
    ) -> EagleShape:  # fmt: skip
        return EagleShape(**numbers_for(config, target_config))

    @property
    def decoder_layers(self) -> Sequence[Any]:
        return list(self.layers)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.target.embed(input_ids).to(self.fc.weight.dtype)

    def project_hidden_states(self, aux_hidden_states: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        return last_hidden_state.to(self.fc.weight.dtype)

    def project_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        return linear(embeddings, self.fc.weight.chunk(2, dim=1)[0], self.fc.bias)

    def pack_first_layer(self) -> tuple[torch.Tensor, ...]:
        return self.fc.weight.chunk(2, dim=1)[1], self.decoder_layers[0].qkv_weight()

    def project_first_layer(
        self, packed: tuple[torch.Tensor, ...], token: torch.Tensor, feature: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # fc [embedding ; feature] is the sum of the token's part and the feature's.
        feature_weight, qkv_weight = packed
        x = torch.addmm(token, feature, feature_weight.T)
        return linear(x, qkv_weight[rows]), x

    @property
    def draft_ids(self) -> torch.Tensor:
        return torch.arange(self.shape.vocab_size, device=self.fc.weight.device)

    def init_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """Copies nothing: the head is the target's own."""

    def init_fc(self) -> None:
        """Sets fc to the identity on the feature, and small random weights on the embedding."""
        h = self.shape.hidden_size
        self.fc.weight.mul_(0.2)
        self.fc.weight[:, h:] += torch.eye(h, device=self.fc.weight.device)
        self.fc.bias.zero_()
