"""The base class of draft networks: Llama-like layers that read a token and a feature, run on their own output.

Training unrolls a draft (:func:`.ttt.unroll`), decoding extends a KV cache (:class:`.drafting.DraftSession`).  A
subclass defines what its first layer reads, where features come from, and what the head is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.algorithms.common.layers import DraftLayer, Rotary
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig, InitFromTarget
    from nemo_speculative.targets.base import Target


class Draft(nn.Module, ABC):
    """A draft network of the EAGLE family; its parameter names are those of the served checkpoint."""

    ARCHITECTURE: ClassVar[str]
    """The class that serves it, as ``config.json`` names it."""
    READS_LAST_HIDDEN: ClassVar[bool] = True
    """Whether :meth:`project_hidden_states` uses the last hidden state: then captured features need it everywhere."""

    target: "Target"
    """Set by :meth:`attach`: the draft uses its frozen embedding and head, which are neither saved nor trained."""

    def __init__(self, shape: DraftShape):
        super().__init__()
        self.shape: Any = shape
        self.rotary = Rotary(shape.rope_parameters, shape.head_dim, shape.max_positions)

    @classmethod
    @abstractmethod
    def shape_for(
        cls, config: "DraftConfig", target_config: Any, aux_layers: Sequence[int], vocabulary_size: int | None
    ) -> DraftShape:
        """The shape of a draft for a target; without a vocabulary size the target's head gives the logits."""

    def attach(self, target: "Target") -> Self:
        """Gives the draft the target's frozen embedding and head."""
        self.target = target
        return self

    @property
    @abstractmethod
    def decoder_layers(self) -> Sequence[DraftLayer]:
        """The decoder layers, lowest first."""

    @abstractmethod
    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → embeddings [..., h]."""

    @abstractmethod
    def project_hidden_states(self, aux_hidden_states: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """The features of positions from the target's states there: [..., A * h], [..., h] → [..., h]."""

    @abstractmethod
    def project_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The part of the first layer that depends on the token alone, the same at every step: [n, h] → [n, w]."""

    @abstractmethod
    def pack_first_layer(self) -> tuple[torch.Tensor, ...]:
        """The weights of :meth:`project_first_layer`; made once per unroll, so that their gradients are summed once."""

    @abstractmethod
    def project_first_layer(
        self, packed: tuple[torch.Tensor, ...], token: torch.Tensor, feature: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the first layer, and its residual.

        They are the needed ``rows`` of [q ; k ; v], [n, (H + 2 * H_kv) * d], and [n, h]; from ``packed`` of
        :meth:`pack_first_layer`, ``token`` [n, w] of :meth:`project_tokens`, and ``feature`` [n, h].
        """

    def next_feature(self, output: torch.Tensor) -> torch.Tensor:
        """The feature of the next step: the last layer's output [..., h] → [..., h]."""
        return output

    def head_input(self, output: torch.Tensor) -> torch.Tensor:
        """The input of the head: the last layer's output [..., h] → [..., h]."""
        return output

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V_d, h] of the draft's own head; None: the target's gives the logits."""
        return None

    def compute_logits(self, output: torch.Tensor) -> torch.Tensor:
        """The last layer's output [..., h] → [..., V_d]."""
        state, weight = self.head_input(output), self.head_weight
        return self.target.logits(state) if weight is None else linear(state, weight)

    @property
    @abstractmethod
    def draft_ids(self) -> torch.Tensor:
        """int64 [V_d]: the target ids of the draft vocabulary, ascending."""

    def set_vocab_mapping(self, vocabulary: VocabMapping) -> None:
        """Sets the ids of the draft vocabulary; a draft under the target's head proposes any id."""

    @abstractmethod
    def init_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """Copies the head from the target's, [V, h] and [h]."""

    @abstractmethod
    def init_fc(self) -> None:
        """Sets fc to the identity on the features that are nearest to the target's output."""


@torch.no_grad()
def init_from_target(draft: Draft, target: "Target", parts: "InitFromTarget") -> None:
    """Copies the chosen parts; the draft's last layers start as the target's last ones.

    This is not in the papers; on a small target the draft trains far faster (see docs/algorithms.md).

    Raises:
        UserError: a part of the target has another shape than the draft's.
    """
    if parts.head:
        draft.init_head(target.head_weight, _norm_weight(target.final_norm) if target.final_norm else None)
    if parts.layer:
        layers = draft.decoder_layers
        for own, source in zip(reversed(layers), reversed(target.last_layers(len(layers))), strict=False):
            _copy_layer(own, source)
    if parts.fc:
        draft.init_fc()


def _copy_layer(own: DraftLayer, layer: nn.Module) -> None:
    weights: dict[str, torch.Tensor] = dict(layer.named_parameters())
    norms = {f"{name}.weight": module for name, module in layer.named_children() if name.endswith("norm")}
    weights |= {name: _norm_weight(module) for name, module in norms.items() if name in weights}
    width = own.mlp.gate_proj.in_features
    for name, parameter in own.named_parameters():
        if name == "input_layernorm.weight" and own.input_norm_name != "input_layernorm":
            continue  # norms the embedding, which the target's layer does not read
        weight = weights.get(name.replace("hidden_norm", "input_layernorm"))
        reads_input = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        # A first layer reads [embedding ; feature]: the target's projection is the feature half.
        part = parameter[:, -width:] if reads_input else parameter
        if weight is None or weight.shape != part.shape:
            raise UserError(
                f"draft.init_from_target.layer: the target's last layers have no {name} of shape {tuple(part.shape)}; "
                "set draft.init_from_target.layer=false to start from random weights"
            )
        if reads_input and own.input_norm_name is None:
            weight = weight * weights["input_layernorm.weight"]
        part.copy_(weight)
        if reads_input:
            parameter[:, :-width].zero_()


def _norm_weight(norm: nn.Module) -> torch.Tensor:
    """The factor by which an RMSNorm multiplies a feature of unit size, [h]; some models store its distance from 1."""
    stored = next(norm.parameters())
    effective = norm(torch.ones_like(stored))
    return min(stored, 1 + stored, key=lambda weight: float((weight - effective).abs().max()))
