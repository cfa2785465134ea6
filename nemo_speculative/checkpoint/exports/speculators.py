"""A draft in the format of speculators, which vLLM serves: ``vllm serve DIR`` finds the target in it.

The layer ids written are one above this project's: vLLM captures the input of a layer, SGLang its output.
"""

from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.eagle3.network import Eagle3Shape
from nemo_speculative.checkpoint.adapters.network import SWITCHES
from nemo_speculative.checkpoint.adapters.speculators import TYPE, TYPE_KEY, their_name
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.exports.base import Export
from nemo_speculative.checkpoint.exports.files import write_model
from nemo_speculative.utils.errors import UserError

ARCHITECTURE = "Eagle3DraftModel"
"""speculators' class; vLLM chooses its own by the type."""


class SpeculatorsExport(Export):
    """EAGLE-3 and EAGLE-3.1 for vLLM."""

    suffix = "speculators"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        shape = servable.shape
        if not isinstance(shape, Eagle3Shape) or shape.draft_vocab_size is None:
            found = servable.algorithm if not isinstance(shape, Eagle3Shape) else "EAGLE3 without a head of its own"
            raise UserError(f"{servable.directory}: is {found}; speculators' format holds EAGLE-3 drafts with a head")
        whole = shape.draft_vocab_size == shape.vocab_size
        tensors = {
            their_name(name): tensor
            for name, tensor in servable.tensors.items()
            if not (whole and name in ("d2t", "t2d"))  # their network has no maps then
        }
        write_model(directory, config_of(servable, shape, target), tensors)


def config_of(servable: Servable, shape: Eagle3Shape, target: Any) -> dict[str, Any]:
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
        # vLLM takes true where it is not stated.
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
        # Both forms: transformers 5 reads the first, what comes before it the other two.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}} if scaled else {}),
        "torch_dtype": _dtype_name(servable),
    }


def _dtype_name(servable: Servable) -> str:
    return str(servable.tensors["fc.weight"].dtype).removeprefix("torch.")
