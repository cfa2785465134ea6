"""The shape of a draft from its target's configuration: sizes, and a rotary embedding that is the same in every server.

A draft rotates as the target's full attention does.  Two things keep it from copying ``rope_parameters``.  Two kinds
(dynamic, longrope) change with the longest sequence of a batch, which depends on the packing in training, and on other
requests in a server.  And SGLang (read in 0.5.9 and 0.5.23) reads some keys differently from transformers, or not at
all, in its draft classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig

Rope = dict[str, Any]
DEFAULT_THETA = 10000.0
PARTIAL_ROTARY_KEYS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Keys that do not apply where the whole head is rotated."""


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """The sizes of a draft network; subclasses add their own fields."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_parameters: dict[str, Any]
    vocab_size: int
    """Number of ids of the target."""
    num_layers: int = 1


def numbers_for(config: "DraftConfig | None", target_config: Any) -> dict[str, Any]:
    """The fields of :class:`DraftShape`: those of one of the target's layers, unless ``config`` sets them.

    Raises:
        UserError: the target's rotary embedding cannot be a draft's.
    """
    heads = target_config.num_attention_heads
    like_target = {
        "hidden_size": target_config.hidden_size,
        "intermediate_size": getattr(target_config, "intermediate_size", None) or 4 * target_config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(target_config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        "num_layers": 1,
    }
    chosen = {name: getattr(config, name, None) for name in like_target}
    numbers = like_target | {name: value for name, value in chosen.items() if value is not None}
    theta = getattr(config, "rope_theta", None)
    rope = rope_like(target_config, numbers["head_dim"]) if theta is None else plain_rope(theta)
    return {
        **numbers,
        "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
        "max_positions": positions_like(target_config, rope),
        "rope_parameters": rope,
        "vocab_size": target_config.vocab_size,
    }


def plain_rope(theta: float) -> Rope:
    """The ``rope_parameters`` of RoFormer (2104.09864), without scaling."""
    return {"rope_type": "default", "rope_theta": theta}


def rope_like(target_config: Any, head_dim: int) -> Rope:
    """``rope_parameters`` of a draft whose heads have ``head_dim`` features.

    The cosines and sines are those of the target's full attention, with these exceptions: a target that rotates a part
    of each head has a draft that rotates the whole head, by the same base; dynamic is what it is up to
    ``max_position_embeddings``; longrope has its long factors at any length.

    Raises:
        UserError: the target's rotation cannot be a draft's.
    """
    rope = _full_attention(target_config)
    kind = rope.get("rope_type", "default")
    if kind not in _KINDS:
        raise _refused(f"rope_type {kind!r}", f"one of {', '.join(_KINDS)}")
    return _KINDS[kind](_without_partial_rotary(rope), target_config, head_dim)


def positions_like(target_config: Any, rope: Rope) -> int:
    """``max_position_embeddings`` with which SGLang lets a draft that rotates by ``rope`` be as long as the target."""
    missing = _stretch(getattr(target_config, "rope_parameters", None) or {}) / _stretch(rope)
    return int(target_config.max_position_embeddings * max(missing, 1.0))


def _stretch(rope: Rope) -> float:
    """The factor by which SGLang multiplies ``max_position_embeddings``."""
    whole = rope.get("rope_type") == "llama3" or "original_max_position_embeddings" in rope
    return 1.0 if whole else rope.get("factor") or 1.0


def _full_attention(config: Any) -> Rope:
    rope = getattr(config, "rope_parameters", None) or plain_rope(DEFAULT_THETA)
    rope = rope.get("full_attention", rope)
    if sets := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise _refused(f"rope_parameters for {', '.join(sets)}", "one set, or one named full_attention")
    return {name: value for name, value in rope.items() if value is not None}


def _without_partial_rotary(rope: Rope) -> Rope:
    if rope.get("partial_rotary_factor", 1) == 1:
        return rope
    return {name: value for name, value in rope.items() if name not in PARTIAL_ROTARY_KEYS}


def _unchanged(rope: Rope, config: Any, head_dim: int) -> Rope:
    return rope


def _dynamic(rope: Rope, config: Any, head_dim: int) -> Rope:
    """Hunyuan's alpha scales the base for every length; without it nothing is scaled within the context."""
    alpha, d = rope.get("alpha") or 1, config.head_dim if rope.get("alpha") else head_dim
    return plain_rope(rope["rope_theta"] * alpha ** (d / (d - 2)))


def _yarn(rope: Rope, config: Any, head_dim: int) -> Rope:
    """SGLang assumes factor 1 where none is set, and reads ``attn_factor``, relative to the one that it infers."""
    factor = rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"]
    rope = rope | {"factor": factor}
    applied = _attention_factor(rope, config, head_dim)
    inferred = _attention_factor(
        {name: value for name, value in rope.items() if name != "attention_factor"}, config, head_dim
    )
    return rope if math.isclose(applied, inferred) else rope | {"attn_factor": applied / inferred}


def _longrope(rope: Rope, config: Any, head_dim: int) -> Rope:
    """Both sets of factors are the long one, so that it does not matter when which one applies."""
    factors = rope["long_factor"]
    if len(factors) != head_dim // 2:
        raise _refused(f"longrope with {len(factors)} factors", f"{head_dim // 2}, for heads of {head_dim} features")
    original = rope["original_max_position_embeddings"]
    scale = max(config.max_position_embeddings / original, 1.0)
    applied = _attention_factor(rope, config, head_dim)
    rope = rope | {"short_factor": factors, "attention_factor": applied}
    inferred = math.sqrt(1 + math.log(scale) / math.log(original))
    return rope if math.isclose(applied, inferred) else rope | {"short_mscale": applied, "long_mscale": applied}


def _proportional(rope: Rope, config: Any, head_dim: int) -> Rope:
    """Scaling of the proportional type: linear where it covers the whole head, but SGLang ignores its factor."""
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    return plain_rope(theta) if factor == 1 else plain_rope(theta) | {"rope_type": "linear", "factor": factor}


_KINDS: dict[str, Callable[[Rope, Any, int], Rope]] = {
    "default": _unchanged,
    "linear": _unchanged,
    "llama3": _unchanged,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def _attention_factor(rope: Rope, config: Any, head_dim: int) -> float:
    """The factor of cosines and sines."""
    # Slow to import, and not needed to read a config.json.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    like = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=config.max_position_embeddings, rope_parameters=dict(rope)
    )
    return float(ROPE_INIT_FUNCTIONS[rope["rope_type"]](like)[1])


def _refused(rope: str, expected: str) -> UserError:
    return UserError(
        f"the target has {rope}, and a draft can follow {expected}: set draft.rope_theta, e.g. 10000, for a plain "
        "rotation of the draft's own"
    )
