"""The hidden states of a target, for the peers whose own trainers receive them from another process."""

import torch
from transformers import LlamaForCausalLM

from benchmarks.training_step.case import Setup


class FeatureCapture:
    """The target without its head.

    Args:
        before_norm: the last hidden state is that before the final norm.
    """

    def __init__(self, setup: Setup, before_norm: bool = False):
        self.aux_layers = setup.case.size.aux_layers
        self.model = LlamaForCausalLM.from_pretrained(
            setup.target, dtype=setup.dtype, attn_implementation="sdpa"
        ).model.requires_grad_(False)
        self._outputs: dict[int | str, torch.Tensor] = {}
        self._last = "before norm" if before_norm else "after norm"
        for layer in self.aux_layers:
            self.model.layers[layer].register_forward_hook(lambda _, __, output, layer=layer: self._keep(layer, output))
        self.model.norm.register_forward_hook(lambda _, inputs, output: self._keep_last(inputs[0], output))

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding's weight, [V, h]."""
        return self.model.embed_tokens.weight

    def _keep(self, layer: int, output: torch.Tensor) -> None:
        self._outputs[layer] = output

    def _keep_last(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self._outputs |= {"before norm": before, "after norm": after}

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the aux states [B, L, A * h], lowest layer first, and the last hidden state [B, L, h].

        Both arguments are int64 [B, L].
        """
        self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        outputs, self._outputs = self._outputs, {}
        return torch.cat([outputs[layer] for layer in self.aux_layers], dim=-1), outputs[self._last]
