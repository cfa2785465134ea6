"""Readers of SafeAILab/EAGLE's and SpecForge's drafts: a Llama's ``config.json``, tensors under SGLang's names.

SafeAILab publishes EAGLE-1 and EAGLE-3 drafts, mostly as ``pytorch_model.bin``.  SpecForge exports EAGLE-3 with
transformers, and also states the aux layers, in ``eagle_config``, and the switches of EAGLE-3.1.
"""

from nemo_speculative.checkpoint.adapters.base import ForeignDraft, Format, Reading, Source, Tensors
from nemo_speculative.checkpoint.adapters.networks import SWITCHES, Eagle3Layout, read_eagle, read_eagle3, switches_of
from nemo_speculative.utils.errors import UserError

EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
ARCHITECTURES = ("LlamaForCausalLM", "LlamaForCausalLMEagle", EAGLE3_ARCHITECTURE)
SPECFORGE_KEYS = {"eagle_config", "rope_parameters", "dtype", *SWITCHES}
"""Keys that SafeAILab's files never have: SpecForge's own, and those of newer versions of transformers."""


class SafeAILab(Format):
    """SafeAILab/EAGLE's drafts, published as yuhuili/EAGLE-* and yuhuili/EAGLE3-*."""

    name = "EAGLE (SafeAILab)"

    def recognizes(self, source: Source) -> bool:
        prefixes = ("fc.", "midlayer.", "layers.")  # a complete model's tensors have another prefix
        return source.architecture in ARCHITECTURES and any(name.startswith(prefixes) for name in source.tensors)

    def read(self, reading: Reading) -> ForeignDraft:
        tensors = reading.source.tensors
        marks = ("midlayer.", "lm_head.", "d2t")
        if reading.source.architecture == EAGLE3_ARCHITECTURE or any(name.startswith(marks) for name in tensors):
            return read_eagle3(self.name, reading, plain_eagle3(reading, tensors), tensors)
        return read_eagle(self.name, reading)


class SpecForge(Format):
    """SpecForge's exports for SGLang and for transformers."""

    name = "SpecForge"

    def recognizes(self, source: Source) -> bool:
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
    """The layout of EAGLE-3 under SGLang's names, with ``prefix`` before all but the head and the vocabulary maps."""
    config = reading.source.config
    eagle = config["eagle_config"] if isinstance(config.get("eagle_config"), dict) else {}
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(
            f"{reading.where}: eagle_config has use_aux_hidden_state=false; expected a draft that reads aux states"
        )
    # A single layer is called midlayer or layers.0; SGLang loads both.
    numbered = any(name.startswith(f"{prefix}layers.0.") for name in tensors)

    def rename(name: str) -> str:
        if name in ("lm_head.weight", "d2t", "t2d"):
            return name
        return prefix + (name.replace("midlayer.", "layers.0.") if numbered else name)

    return Eagle3Layout(
        config=config,
        rename=rename,
        aux_layers=eagle.get("eagle_aux_hidden_state_layer_ids"),
        switches=switches_of(eagle | config, reading.where),
    )
