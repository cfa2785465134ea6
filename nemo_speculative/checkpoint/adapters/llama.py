"""The plain layout, of SafeAILab/EAGLE and SpecForge: a Llama's ``config.json``, tensors named as SGLang reads them.

SafeAILab publishes both kinds of draft, as ``pytorch_model.bin`` mostly.  SpecForge exports EAGLE-3 with transformers,
and says more: aux layers in ``eagle_config``, the switches of EAGLE-3.1 beside the numbers.
"""

from collections.abc import Callable
from typing import Any

from nemo_speculative.checkpoint.adapters.files import Source, Tensors
from nemo_speculative.checkpoint.adapters.format import ForeignDraft, Format, Reading
from nemo_speculative.checkpoint.adapters.network import SWITCHES, Eagle3Layout, read_eagle, read_eagle3, switches_of
from nemo_speculative.utils.errors import UserError

EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
ARCHITECTURES = ("LlamaForCausalLM", "LlamaForCausalLMEagle", EAGLE3_ARCHITECTURE)
SPECFORGE_KEYS = {"eagle_config", "rope_parameters", "dtype", *SWITCHES}
"""What SafeAILab's files never state: SpecForge's own keys, and those of the transformers that it saves with."""


class SafeAILab(Format):
    """SafeAILab/EAGLE's own drafts, the ones published as yuhuili/EAGLE-* and yuhuili/EAGLE3-*."""

    name = "EAGLE (SafeAILab)"

    def recognises(self, source: Source) -> bool:
        parts = ("fc.", "midlayer.", "layers.")  # a whole model has a prefix
        return source.architecture in ARCHITECTURES and any(name.startswith(parts) for name in source.tensors)

    def read(self, reading: Reading) -> ForeignDraft:
        tensors = reading.source.tensors
        if _is_eagle3(reading.source):
            return read_eagle3(self.name, reading, plain_eagle3(reading, tensors), tensors)
        return read_eagle(self.name, reading)


class SpecForge(Format):
    """SpecForge's exports for SGLang and for transformers."""

    name = "SpecForge"

    def recognises(self, source: Source) -> bool:
        return source.architecture == EAGLE3_ARCHITECTURE and not SPECFORGE_KEYS.isdisjoint(source.config)

    def read(self, reading: Reading) -> ForeignDraft:
        tensors, config = reading.source.tensors, reading.source.config
        if "norm_output" in config:
            reading.notes.append(
                f"norm_output is {config['norm_output']}, read as SGLang reads it; before its pull request 879 "
                "(September 2026) SpecForge trained with another meaning of it, and τ suffers if this draft is older"
            )
        return read_eagle3(self.name, reading, plain_eagle3(reading, tensors), tensors)


def plain_eagle3(reading: Reading, tensors: Tensors, prefix: str = "") -> Eagle3Layout:
    """The layout of EAGLE-3 under SGLang's names, all but the head and the vocabulary behind ``prefix``."""
    config = reading.source.config
    return Eagle3Layout(
        config=config,
        rename=_names(tensors, prefix),
        aux_layers=_stated_aux_layers(reading),
        switches=switches_of(_eagle_config(config) | config, reading.where),
    )


def _names(tensors: Tensors, prefix: str) -> Callable[[str], str]:
    """A single layer is called midlayer or layers.0; SGLang loads both."""
    numbered = any(name.startswith(f"{prefix}layers.0.") for name in tensors)

    def rename(ours: str) -> str:
        if ours in ("lm_head.weight", "d2t", "t2d"):
            return ours
        return prefix + (ours.replace("midlayer.", "layers.0.") if numbered else ours)

    return rename


def _is_eagle3(source: Source) -> bool:
    marks = ("midlayer.", "lm_head.", "d2t")
    return source.architecture == EAGLE3_ARCHITECTURE or any(name.startswith(marks) for name in source.tensors)


def _eagle_config(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("eagle_config")
    return found if isinstance(found, dict) else {}


def _stated_aux_layers(reading: Reading) -> list[int] | None:
    found = _eagle_config(reading.source.config)
    if found.get("use_aux_hidden_state") is False:
        raise UserError(
            f"{reading.where}: eagle_config has use_aux_hidden_state=false; expected a draft that reads aux states"
        )
    return found.get("eagle_aux_hidden_state_layer_ids")
