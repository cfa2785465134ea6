"""The EAGLE-1 and EAGLE-2 draft network (2401.15077): feature autoregression under the target's own head.

Notable choices:
- fc reads [embedding ; feature] and has a bias, which a server always builds;
- the first layer has no input norm, and there is no final norm: the output is a prediction of the target's last
  hidden state, after its final norm;
- embedding and head are the target's, frozen, and not part of the checkpoint.
EAGLE-2 is the same network; its tree is a matter of decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.draft import Draft, DraftShape, numbers_for
from nemo_speculative.algorithms.common.layers import DraftLayer

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig

EMBEDDING_SCALE = 0.2
"""The random weights of fc are shrunk to this share where fc starts as the identity on the feature."""


@dataclass(frozen=True, kw_only=True)
class EagleShape(DraftShape):
    """Every number that shapes the network; the hidden size is the target's."""


class EagleEntry:
    """q, k and v of fc([embedding ; feature]); see :class:`nemo_speculative.algorithms.common.ttt.Entry`."""

    def __init__(self, draft: "EagleDraft"):
        self.of_token, self.of_feature = draft.fc.weight.chunk(2, dim=1)
        self.bias, self.weight = draft.fc.bias, draft.stack[0].qkv_weight()

    def token(self, embeddings: torch.Tensor) -> torch.Tensor:
        return linear(embeddings, self.of_token, self.bias)

    def project(self, token: torch.Tensor, feature: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.addmm(token, feature, self.of_feature.T)
        return linear(x, self.weight[rows]), x


class EagleDraft(Draft):
    """See the module's text."""

    ARCHITECTURE = "LlamaForCausalLMEagle"
    ALGORITHM = "EAGLE"

    def __init__(self, shape: EagleShape):
        super().__init__(shape)
        self.shape = shape
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
    def stack(self) -> Sequence[Any]:
        return list(self.layers)

    @property
    def draft_ids(self) -> torch.Tensor:
        return torch.arange(self.shape.vocab_size, device=self.fc.weight.device)

    def read(self, aux: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        return last_hidden_state.to(self.fc.weight.dtype)

    def token_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings

    def enter(self, token: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.fc(torch.cat((token, feature), dim=-1))
        return x, x

    def entry(self) -> "EagleEntry":
        return EagleEntry(self)

    def start_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """The head is the target's own already."""

    def start_fc(self) -> None:
        """The identity on the feature."""
        h = self.shape.hidden_size
        self.fc.weight.mul_(EMBEDDING_SCALE)
        self.fc.weight[:, h:] += torch.eye(h, device=self.fc.weight.device)
        self.fc.bias.zero_()
