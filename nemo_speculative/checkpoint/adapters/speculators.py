"""Reader and writer of speculators' format, which vLLM serves: ``vllm serve DIR`` reads the target from it.

The sizes are in ``transformer_layer_config``, the layers are named ``layers.N``.  A layer id names the INPUT of a
layer, which vLLM captures: it is one above SGLang's and this project's, which name the output.  A draft whose residual
is the normalized feature (norm_before_residual) is another network, which SGLang lacks.
"""

import re
from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.checkpoint.adapters.base import Export, ForeignDraft, Format, Reading, Source, write_exported
from nemo_speculative.checkpoint.adapters.networks import SWITCHES, Eagle3Layout, read_eagle3, switches_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.utils.errors import UserError

TYPE_KEY, TYPE = "speculators_model_type", "eagle3"
ARCHITECTURE = "Eagle3DraftModel"
"""speculators' class; vLLM chooses its own class by the type."""
VERIFIER_TENSORS = ("verifier_lm_head.weight", "verifier_norm.weight")
"""Copies of the target's tensors, used in training only."""
DEEPER_NORM = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight")


class Speculators(Format):
    """speculators' EAGLE-3 checkpoints."""

    name = "speculators (vLLM)"

    def recognizes(self, source: Source) -> bool:
        return TYPE_KEY in source.config

    def target(self, source: Source) -> str | None:
        value: Any = source.config.get("speculators_config")
        for key in ("verifier", "name_or_path"):
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    def read(self, reading: Reading) -> ForeignDraft:
        config = reading.source.config
        inner = config.get("transformer_layer_config")
        layer = inner if isinstance(inner, dict) else {}
        _expect(reading, TYPE_KEY, config[TYPE_KEY], TYPE)
        _expect(reading, "norm_before_residual", config.get("norm_before_residual", False), False)
        _expect(reading, "transformer_layer_config.model_type", layer.get("model_type", "llama"), "llama")
        layout = Eagle3Layout(
            config=layer | {key: config.get(key) for key in ("target_hidden_size", "draft_vocab_size")},
            rename=file_name,
            aux_layers=_outputs(reading, config.get("eagle_aux_hidden_state_layer_ids")),
            switches=switches_of(config, reading.where),
            unused=VERIFIER_TENSORS,
        )
        return read_eagle3(self.name, reading, layout, reading.source.tensors)


def file_name(name: str) -> str:
    """This format's name of a tensor of an EAGLE-3 draft; after the first, its layers are plain Llama layers."""
    if DEEPER_NORM.fullmatch(name):
        return name.replace("hidden_norm", "input_layernorm")
    return name.replace("midlayer.", "layers.0.")


def _outputs(reading: Reading, inputs: Any) -> list[int] | None:
    """Layer ids of outputs from those of inputs."""
    if inputs is None:
        return None
    if not isinstance(inputs, list) or not all(type(layer) is int for layer in inputs):
        raise UserError(f"{reading.where}: eagle_aux_hidden_state_layer_ids is {inputs!r}, expected a list of layers")
    return [layer - 1 for layer in inputs]


def _expect(reading: Reading, key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise UserError(
            f"{reading.where}: {key} is {value!r}, expected {expected!r}; SGLang and this project lack such a network"
        )


class SpeculatorsExport(Export):
    """EAGLE-3 and EAGLE-3.1 for vLLM."""

    suffix = "speculators"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        shape = servable.shape
        if not isinstance(shape, Eagle3Shape) or shape.draft_vocab_size is None:
            kind = servable.algorithm if not isinstance(shape, Eagle3Shape) else "EAGLE3 without a head of its own"
            raise UserError(f"{servable.directory}: is {kind}; speculators' format holds EAGLE-3 drafts with a head")
        whole = shape.draft_vocab_size == shape.vocab_size
        tensors = {
            file_name(name): tensor
            for name, tensor in servable.tensors.items()
            if not (whole and name in ("d2t", "t2d"))  # the format has no maps then
        }
        write_exported(directory, _export_config(servable, shape, target), tensors)


def _export_config(servable: Servable, shape: Eagle3Shape, target: Any) -> dict[str, Any]:
    """The contents of ``config.json``."""
    return {
        "architectures": [ARCHITECTURE],
        TYPE_KEY: TYPE,
        "speculators_config": {
            "algorithm": TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": servable.provenance.speculative.num_steps,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": servable.provenance.target,
                "architectures": list(target.architectures or []),
            },
        },
        "transformer_layer_config": _layer_config(servable, shape),
        "draft_vocab_size": shape.draft_vocab_size,
        "target_hidden_size": shape.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in shape.aux_layers],
        # vLLM's default is true.
        "norm_before_residual": False,
        **{name: getattr(shape, name) for name in SWITCHES},
        "tie_word_embeddings": False,
        "torch_dtype": _dtype_name(servable),
    }


def _layer_config(servable: Servable, shape: Eagle3Shape) -> dict[str, Any]:
    rope = dict(shape.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_positions,
        "vocab_size": shape.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # Both forms: transformers 5 reads the first, older versions the other two.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}} if scaled else {}),
        "torch_dtype": _dtype_name(servable),
    }


def _dtype_name(servable: Servable) -> str:
    return str(servable.tensors["fc.weight"].dtype).removeprefix("torch.")
