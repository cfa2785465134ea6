"""The start of a draft from the target's weights instead of random ones.

This is not in the papers; on a small target the draft trains far faster (see docs/algorithms.md).  Each part is a
switch of ``draft.init_from_target``.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.layers import DraftLayer
from nemo_speculative.config.schema import InitFromTarget
from nemo_speculative.utils.errors import UserError


class Source(Protocol):
    """The weights of a target."""

    @property
    def head_weight(self) -> torch.Tensor: ...

    @property
    def final_norm(self) -> nn.Module | None: ...

    def last_layers(self, count: int) -> Sequence[nn.Module]: ...


@torch.no_grad()
def init_from_target(draft: Draft, target: Source, parts: InitFromTarget) -> None:
    """Copies the chosen parts; the draft's last layers start as the target's last ones.

    Raises:
        UserError: a part of the target has another shape than the draft's.
    """
    if parts.head:
        draft.init_head(target.head_weight, norm_weight(target.final_norm) if target.final_norm else None)
    if parts.layer:
        layers = draft.decoder_layers
        for own, source in zip(reversed(layers), reversed(target.last_layers(len(layers))), strict=False):
            _copy_layer(own, source)
    if parts.fc:
        draft.init_fc()


def _copy_layer(own: DraftLayer, layer: nn.Module) -> None:
    weights = _weights(layer)
    for name, parameter in own.named_parameters():
        if name == "input_layernorm.weight" and own.input_norm_name != "input_layernorm":
            continue  # norms the embedding, which the target's layer does not read
        weight = weights.get(name.replace("hidden_norm", "input_layernorm"))
        reads_input = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        # A first layer reads [embedding ; feature]: the target's projection is the feature half.
        part = parameter[:, -own.feature_size :] if reads_input else parameter
        if weight is None or weight.shape != part.shape:
            raise UserError(
                f"draft.init_from_target.layer: the target's last layers have no {name} of shape {tuple(part.shape)}; "
                "set draft.init_from_target.layer=false to start from random weights"
            )
        if reads_input and own.input_norm_name is None:
            weight = weight * weights["input_layernorm.weight"]
        part.copy_(weight)
        if reads_input:
            parameter[:, : -own.feature_size].zero_()


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The layer's weights by name; a norm's effective weight, since some models store its distance from one."""
    weights: dict[str, torch.Tensor] = dict(layer.named_parameters())
    for name, module in layer.named_children():
        if f"{name}.weight" in weights and name.endswith("norm"):
            weights[f"{name}.weight"] = norm_weight(module)
    return weights


def norm_weight(norm: nn.Module) -> torch.Tensor:
    """The factor by which an RMSNorm multiplies a feature of unit size: [h]."""
    stored = next(norm.parameters())
    effective = norm(torch.ones_like(stored))
    return min(stored, 1 + stored, key=lambda weight: float((weight - effective).abs().max()))
