"""The hidden states of a target, for the peers that have another process compute them."""

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
        self._seen: dict[int | str, torch.Tensor] = {}
        self._last = "before norm" if before_norm else "after norm"
        for layer in self.aux_layers:
            self.model.layers[layer].register_forward_hook(lambda _, __, output, layer=layer: self._keep(layer, output))
        self.model.norm.register_forward_hook(lambda _, inputs, output: self._keep_last(inputs[0], output))

    @property
    def embedding(self) -> torch.Tensor:
        """[V, h]."""
        return self.model.embed_tokens.weight

    def _keep(self, layer: int, output: torch.Tensor) -> None:
        self._seen[layer] = output

    def _keep_last(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self._seen |= {"before norm": before, "after norm": after}

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, L] twice → the aux states [B, L, A * h], lowest first, and the last hidden state [B, L, h]."""
        self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        seen, self._seen = self._seen, {}
        return torch.cat([seen[layer] for layer in self.aux_layers], dim=-1), seen[self._last]
