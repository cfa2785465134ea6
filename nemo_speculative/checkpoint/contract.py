"""``config.json`` of a served draft: its fields from a shape, and a shape from its fields, for every architecture.

On the way back each field that SGLang would misread is refused.  ``algorithms/<name>/contract.py`` has what one
architecture adds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_speculative.algorithms.common.contract import Contract, DraftShape, number
from nemo_speculative.algorithms.eagle.contract import EagleContract
from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing torch
    import torch

    from nemo_speculative.algorithms.common.draft import Draft

CONTRACTS: dict[str, Contract] = {
    "LlamaForCausalLMEagle": EagleContract(),
    "LlamaForCausalLMEagle3": Eagle3Contract(),
}
"""The known contracts, by architecture."""
SIZES = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "num_layers": "num_hidden_layers",
    "max_positions": "max_position_embeddings", "vocab_size": "vocab_size",
}  # fmt: skip
"""The whole numbers of a :class:`DraftShape` and their fields in ``config.json``."""
CONSTANTS = {
    "model_type": "llama", "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def register(contract: Contract) -> None:
    """Makes an architecture known, so that checkpoints of it can be written, read and decoded."""
    CONTRACTS[contract.architecture] = contract


def contract_of(draft: "type[Draft]") -> Contract:
    """The contract of the architecture that serves ``draft``."""
    return CONTRACTS[draft.ARCHITECTURE]


def fields_of(contract: Contract, shape: Any, dtype: "torch.dtype") -> dict[str, Any]:
    """The contents of ``config.json`` that describe the network."""
    return {"architectures": [contract.architecture], **llama_fields(shape, dtype), **contract.own_fields(shape)}


def llama_fields(shape: DraftShape, dtype: "torch.dtype") -> dict[str, Any]:
    """The fields that describe the draft's layers, under the names of transformers' LlamaConfig."""
    return {
        **CONSTANTS,
        **{key: getattr(shape, name) for name, key in SIZES.items()},
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": dict(shape.rope_parameters),
        **_legacy_rope_fields(shape.rope_parameters),
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
    """The network that a ``config.json`` describes; raises UserError if SGLang would misread a field or lack it."""
    try:
        names = config["architectures"]
        contract = CONTRACTS.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
        if contract is None:
            raise UserError(f"{where}: architectures is {names!r}, expected one of {', '.join(sorted(CONTRACTS))}")
        _check_fields(config, CONSTANTS, where)
        numbers = {name: number(config, key, where) for name, key in SIZES.items()}
        numbers["rms_norm_eps"] = number(config, "rms_norm_eps", where, float)
        rope = numbers["rope_parameters"] = config["rope_parameters"]
        if not isinstance(rope, dict):
            raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object")
        shape = contract.shape(config, numbers, where)
        _check_fields(config, _legacy_rope_fields(rope) | contract.own_fields(shape), where)
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]} is missing") from None
    return contract, shape


def _check_fields(config: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    for key, value in expected.items():
        if config[key] != value:
            raise UserError(f"{where}: {key} is {config[key]!r}, expected {value!r}")
