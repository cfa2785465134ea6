"""``config.json`` of a served draft: its fields from a shape, and a shape from its fields, for every architecture.

On the way back each field that SGLang would misread is refused.  ``algorithms/<name>/contract.py`` has what one
architecture adds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_speculative.algorithms.common.contract import Contract, number
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.algorithms.eagle.contract import EagleContract
from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing torch
    import torch

    from nemo_speculative.algorithms.common.draft import Draft

FIXED_FLAGS = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}


CONTRACTS: dict[str, Contract] = {
    "LlamaForCausalLMEagle": EagleContract(),
    "LlamaForCausalLMEagle3": Eagle3Contract(),
}
"""The known contracts, by architecture."""


def register(contract: Contract) -> None:
    """Makes an architecture known, so that checkpoints of it can be written, read and decoded."""
    CONTRACTS[contract.architecture] = contract


def contract_of(draft: "type[Draft]") -> Contract:
    """The contract of the architecture that serves ``draft``."""
    return CONTRACTS[draft.ARCHITECTURE]


def fields_of(contract: Contract, shape: Any, dtype: "torch.dtype") -> dict[str, Any]:
    """The contents of ``config.json`` that describe the network."""
    return {
        "architectures": [contract.architecture],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": dict(shape.rope_parameters),
        "vocab_size": shape.vocab_size,
        **FIXED_FLAGS,
        **_legacy_rope_fields(shape.rope_parameters),
        **contract.own_fields(shape),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _legacy_rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    """The fields that older engines read where transformers 5 reads rope_parameters."""
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
    }


def shape_of(config: dict[str, Any], where: Path) -> tuple[Contract, DraftShape]:
    """The network that a ``config.json`` describes.

    Raises:
        UserError: a field is missing, or has a value that SGLang would misread.
    """
    try:
        contract = _contract_named(config["architectures"], where)
        _check_fields(config, {"model_type": "llama", "hidden_act": "silu", **FIXED_FLAGS}, where)
        shape = contract.shape(config, _numbers(config, where), where)
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]} is missing") from None
    _check_fields(config, _legacy_rope_fields(shape.rope_parameters) | contract.own_fields(shape), where)
    return contract, shape


def _contract_named(architectures: Any, where: Path) -> Contract:
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or name not in CONTRACTS:
        raise UserError(f"{where}: architectures is {architectures!r}, expected one of {', '.join(sorted(CONTRACTS))}")
    return CONTRACTS[name]


def _numbers(config: dict[str, Any], where: Path) -> dict[str, Any]:
    rope = config["rope_parameters"]
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object")
    return {
        "hidden_size": number(config, "hidden_size", where),
        "intermediate_size": number(config, "intermediate_size", where),
        "num_heads": number(config, "num_attention_heads", where),
        "num_kv_heads": number(config, "num_key_value_heads", where),
        "head_dim": number(config, "head_dim", where),
        "num_layers": number(config, "num_hidden_layers", where),
        "rms_norm_eps": number(config, "rms_norm_eps", where, float),
        "max_positions": number(config, "max_position_embeddings", where),
        "rope_parameters": rope,
        "vocab_size": number(config, "vocab_size", where),
    }


def _check_fields(config: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    for key, value in expected.items():
        if key not in config:
            raise UserError(f"{where}: the field {key} is missing")
        if config[key] != value:
            raise UserError(f"{where}: {key} is {config[key]!r}, expected {value!r}")
