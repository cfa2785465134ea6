"""The sizes of a draft from a ``config.json`` that describes a Llama-like network.

Missing fields have the defaults of transformers' LlamaConfig, because the projects that write these files use that
class or a copy of it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_speculative.algorithms.common.layers import Rotary
from nemo_speculative.utils.errors import UserError

DEFAULTED_WHOLE = (
    "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
DEFAULT_THETA = 10000.0
LARGEST = 1 << 30
UNBOUNDED = ("default", "linear", "llama3")
"""RoPE types whose rotations do not depend on max_position_embeddings."""


def numbers_of(config: dict[str, Any], target: Any, where: Path, notes: list[str]) -> dict[str, Any]:
    """The fields of a DraftShape except num_layers, which follows from the tensors.

    Args:
        config: the contents of the file; null counts as missing.
        target: the target's transformers configuration.
        notes: assumptions are appended to it.

    Raises:
        UserError: a field has a wrong type, describes a network that is not supported, or contradicts the target.
    """
    stated = {key: value for key, value in config.items() if value is not None}
    llama = LlamaConfig()
    values = {key: getattr(llama, key) for key in (*DEFAULTED_WHOLE, "rms_norm_eps", "hidden_act")} | stated
    _check_whole(values, DEFAULTED_WHOLE, where)
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    _check_values(values, target.vocab_size, where)
    rope = _rope(stated, where, notes)
    _check_usable(rope, values, where)
    return {
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "rms_norm_eps": float(values["rms_norm_eps"]),
        "max_positions": _max_positions(values["max_position_embeddings"], rope, target, notes),
        "rope_parameters": rope,
        "vocab_size": values["vocab_size"],
    }


def _check_values(values: dict[str, Any], target_vocab: int, where: Path) -> None:
    _check_whole(values, ("num_key_value_heads", "head_dim"), where)
    heads, kv_heads, head_dim = (values[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    _check(heads % kv_heads == 0, where, "num_key_value_heads", kv_heads, f"a divisor of {heads}")
    _check(head_dim % 2 == 0, where, "head_dim", head_dim, "an even number")
    _check(values["hidden_act"] == "silu", where, "hidden_act", values["hidden_act"], "silu")
    _check(_is_positive(values["rms_norm_eps"]), where, "rms_norm_eps", values["rms_norm_eps"], "a number above 0")
    _check(
        values["vocab_size"] == target_vocab, where, "vocab_size", values["vocab_size"], f"the target's {target_vocab}"
    )


def _check_whole(values: dict[str, Any], keys: Iterable[str], where: Path) -> None:
    for key in keys:
        plausible = type(values[key]) is int and 0 < values[key] <= LARGEST
        _check(plausible, where, key, values[key], f"a number above 0, at most {LARGEST}")


def _rope(stated: dict[str, Any], where: Path, notes: list[str]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, from that field or from ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if stated.get("rope_parameters") else "rope_scaling"
    source = stated.get(key) or {}
    flat = isinstance(source, dict) and not any(isinstance(value, dict) for value in source.values())
    _check(flat, where, key, source, "one set of parameters")
    rope = {name: value for name, value in source.items() if name not in ("type", "rope_type")}
    rope["rope_type"] = source.get("rope_type", source.get("type", "default"))
    known = ("default", *ROPE_INIT_FUNCTIONS)
    _check(rope["rope_type"] in known, where, key, source, f"a rope_type among {', '.join(sorted(known))}")
    _check(rope.get("partial_rotary_factor", 1) == 1, where, key, source, "a rotation of the whole head")
    if "rope_theta" not in rope:
        rope["rope_theta"] = stated.get("rope_theta", DEFAULT_THETA)
        if "rope_theta" not in stated:
            notes.append(f"rope_theta is not stated: {DEFAULT_THETA:g}, the default of its own project and of SGLang")
    _check(_is_positive(rope["rope_theta"]), where, "rope_theta", rope["rope_theta"], "a number above 0")
    return rope


def _check_usable(rope: dict[str, Any], values: dict[str, Any], where: Path) -> None:
    try:
        with torch.device("meta"):
            Rotary(rope, values["head_dim"], values["max_position_embeddings"])
    except Exception as error:  # each RoPE type of transformers raises other classes
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: rope parameters {rope} cannot be used by transformers ({reason})") from None


def _max_positions(stated: int, rope: dict[str, Any], target: Any, notes: list[str]) -> int:
    """The number of positions, at least the target's: SGLang refuses fewer, and many drafts state their training's."""
    longest = target.max_position_embeddings
    if stated >= longest or rope["rope_type"] not in UNBOUNDED:
        return stated
    notes.append(
        f"max_position_embeddings is {stated}: raised to the target's {longest}, which changes no rotation "
        f"(rope_type {rope['rope_type']})"
    )
    return longest


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _check(holds: bool, where: Path, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"{where}: {key} is {value!r}, expected {expected}")
