"""The format of vLLM's speculators: a Llama's numbers in ``transformer_layer_config``, layers named ``layers.N``.

Its layer ids name what vLLM captures, the INPUT of a layer: one more than SGLang's and this project's, which name the
output.  A draft whose residual is the normed feature (norm_before_residual) is another network, which SGLang lacks.
"""

import re
from typing import Any

from nemo_speculative.checkpoint.adapters.files import Source
from nemo_speculative.checkpoint.adapters.format import ForeignDraft, Format, Reading
from nemo_speculative.checkpoint.adapters.network import Eagle3Layout, read_eagle3, switches_of
from nemo_speculative.utils.errors import UserError

TYPE_KEY, TYPE = "speculators_model_type", "eagle3"
VERIFIER = ("verifier_lm_head.weight", "verifier_norm.weight")
"""Copies of the target's, for training only."""
DEEPER_NORM = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight")


class Speculators(Format):
    """speculators' EAGLE-3."""

    name = "speculators (vLLM)"

    def recognises(self, source: Source) -> bool:
        return TYPE_KEY in source.config

    def target(self, source: Source) -> str | None:
        found: Any = source.config.get("speculators_config")
        for key in ("verifier", "name_or_path"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None

    def read(self, reading: Reading) -> ForeignDraft:
        config = reading.source.config
        inner = config.get("transformer_layer_config")
        layer = inner if isinstance(inner, dict) else {}
        _expect(reading, TYPE_KEY, config[TYPE_KEY], TYPE)
        _expect(reading, "norm_before_residual", config.get("norm_before_residual", False), False)
        _expect(reading, "transformer_layer_config.model_type", layer.get("model_type", "llama"), "llama")
        layout = Eagle3Layout(
            config=layer | {key: config.get(key) for key in ("target_hidden_size", "draft_vocab_size")},
            rename=their_name,
            aux_layers=_outputs(reading, config.get("eagle_aux_hidden_state_layer_ids")),
            switches=switches_of(config, reading.where),
            unused=VERIFIER,
        )
        return read_eagle3(self.name, reading, layout, reading.source.tensors)


def their_name(ours: str) -> str:
    """What this format calls a tensor of an EAGLE-3 draft; below the first, its layers are plain Llama layers."""
    if DEEPER_NORM.fullmatch(ours):
        return ours.replace("hidden_norm", "input_layernorm")
    return ours.replace("midlayer.", "layers.0.")


def _outputs(reading: Reading, inputs: Any) -> list[int] | None:
    if inputs is None:
        return None
    if not isinstance(inputs, list) or not all(type(layer) is int for layer in inputs):
        raise UserError(f"{reading.where}: eagle_aux_hidden_state_layer_ids is {inputs!r}, expected a list of layers")
    return [layer - 1 for layer in inputs]


def _expect(reading: Reading, key: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise UserError(
            f"{reading.where}: {key} is {found!r}, expected {expected!r}; SGLang and this project lack such a network"
        )
