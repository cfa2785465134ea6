"""``config.json`` of a served draft, for each architecture: its fields from a shape, and a shape from its fields.

What SGLang would misread is refused on the way back, field by field.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from nemo_speculative.algorithms.common.draft import Draft, DraftShape
from nemo_speculative.algorithms.eagle.network import EagleDraft, EagleShape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft, Eagle3Shape
from nemo_speculative.utils.errors import UserError

FIXED_FLAGS = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}


class Contract(ABC):
    """What the architecture of one draft class writes and reads."""

    draft: ClassVar[type[Draft]]

    @property
    def architecture(self) -> str:
        return self.draft.ARCHITECTURE

    @abstractmethod
    def own_fields(self, shape: Any) -> dict[str, Any]:
        """The fields that other architectures lack."""

    @abstractmethod
    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> DraftShape:
        """The shape, from ``numbers`` of :class:`DraftShape` and the fields of its own."""

    def expected_ids(self, shape: Any) -> bool:
        """Whether the checkpoint holds d2t and t2d."""
        return False


class EagleContract(Contract):
    """EAGLE-1 and EAGLE-2."""

    draft = EagleDraft

    def own_fields(self, shape: EagleShape) -> dict[str, Any]:
        return {}

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> EagleShape:
        if "eagle_config" in config:
            raise UserError(
                f"{where}: architectures is [{self.architecture!r}], but eagle_config belongs to EAGLE-3; served as "
                "the former it would accept nothing"
            )
        return EagleShape(**numbers)


class Eagle3Contract(Contract):
    """EAGLE-3 and EAGLE-3.1."""

    draft = Eagle3Draft
    SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")

    def own_fields(self, shape: Eagle3Shape) -> dict[str, Any]:
        return {
            "draft_vocab_size": shape.draft_vocab_size,
            "num_aux_hidden_states": len(shape.aux_layers),
            "target_hidden_size": shape.target_hidden_size,
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers)},
            # Left out where off, so that a reader that does not know them meets nothing new.
            **{name: True for name in self.SWITCHES if getattr(shape, name)},
        }

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> Eagle3Shape:
        switches: dict[str, Any] = {name: _switch(config, name, where) for name in self.SWITCHES}
        shape = Eagle3Shape(
            **numbers,
            **switches,
            draft_vocab_size=None if config["draft_vocab_size"] is None else number(config, "draft_vocab_size", where),
            aux_layers=_aux_layers(config["eagle_config"], where),
            target_hidden_size=number(config, "target_hidden_size", where),
        )
        if (shape.draft_vocab_size or 0) > shape.vocab_size:
            raise UserError(f"{where}: draft_vocab_size is {shape.draft_vocab_size}, vocab_size {shape.vocab_size}")
        if shape.fc_norm and shape.norm_before_fc:
            raise UserError(f"{where}: fc_norm and norm_before_fc are both true; expected at most one of them")
        if shape.draft_vocab_size is None and shape.own_embedding:
            raise UserError(
                f"{where}: draft_vocab_size is null, but the target's head reads {shape.target_hidden_size} features, "
                f"and hidden_size is {shape.hidden_size}"
            )
        if shape.fc_width == shape.hidden_size:
            raise UserError(
                f"{where}: {len(shape.aux_layers)} aux states are as wide as hidden_size {shape.hidden_size}; SGLang "
                "applies fc only where the widths differ"
            )
        return shape

    def expected_ids(self, shape: Eagle3Shape) -> bool:
        return shape.draft_vocab_size is not None


CONTRACTS: dict[str, Contract] = {}
"""By architecture."""


def register(contract: Contract) -> None:
    """Makes an architecture known, so that checkpoints of it can be written and read."""
    CONTRACTS[contract.architecture] = contract


register(EagleContract())
register(Eagle3Contract())


def contract_of(draft: type[Draft]) -> Contract:
    """The contract of the architecture that serves ``draft``."""
    return CONTRACTS[draft.ARCHITECTURE]


def fields_of(contract: Contract, shape: Any, dtype: torch.dtype) -> dict[str, Any]:
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
        **_rope_said_twice(shape.rope_parameters),
        **contract.own_fields(shape),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _rope_said_twice(rope: dict[str, Any]) -> dict[str, Any]:
    """Older engines read these where transformers 5 reads rope_parameters."""
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
    }


def shape_of(config: dict[str, Any], where: Path) -> tuple[Contract, DraftShape]:
    """The network that a ``config.json`` describes.

    Raises:
        UserError: a field is missing or says what SGLang would misread.
    """
    try:
        contract = _contract_named(config["architectures"], where)
        _check_fields(config, {"model_type": "llama", "hidden_act": "silu", **FIXED_FLAGS}, where)
        shape = contract.shape(config, _numbers(config, where), where)
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]} is missing") from None
    _check_fields(config, _rope_said_twice(shape.rope_parameters) | contract.own_fields(shape), where)
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


def number(config: dict[str, Any], key: str, where: Path, *kinds: type) -> Any:
    """``config[key]``, a number above 0: an int, or one of ``kinds``.

    Raises:
        KeyError: it is missing.
        UserError: it is something else.
    """
    value = config[key]
    if type(value) not in (int, *kinds) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def _switch(config: dict[str, Any], name: str, where: Path) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}, expected true or false")
    return value


def _aux_layers(eagle: Any, where: Path) -> tuple[int, ...]:
    layers: Any = eagle.get("eagle_aux_hidden_state_layer_ids") if isinstance(eagle, dict) else None
    numbers = isinstance(layers, list) and bool(layers) and all(type(v) is int and v >= 0 for v in layers)
    if not numbers or len(set(layers)) != len(layers) or eagle.get("use_aux_hidden_state") is not True:
        raise UserError(
            f"{where}: eagle_config is {eagle!r}, expected use_aux_hidden_state=true and distinct layer ids"
        )
    return tuple(layers)
