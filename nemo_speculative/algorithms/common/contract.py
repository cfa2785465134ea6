"""The shape of a draft, from its target's configuration, and the contract of ``config.json`` between draft and server.

A draft rotates as the target's full attention does.  Two things keep it from copying ``rope_parameters``.  Two kinds
(dynamic, longrope) change with the longest sequence of a batch, which depends on the packing in training, and on other
requests in a server.  And SGLang (read in 0.5.9 and 0.5.23) reads some keys differently from transformers, or not at
all, in its draft classes.
"""

import math
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing torch or Hydra
    from nemo_speculative.algorithms.common.draft import Draft
    from nemo_speculative.algorithms.common.drafting import DraftSession
    from nemo_speculative.config.schema import DraftConfig

Rope = dict[str, Any]
DEFAULT_THETA = 10000.0


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
    rope_parameters: Rope
    vocab_size: int
    """Number of ids of the target."""
    num_layers: int = 1


class Contract(ABC):
    """A served architecture: its draft class, its drafting, and its fields of ``config.json``."""

    algorithm: ClassVar[str]
    """SGLang's --speculative-algorithm."""
    network: ClassVar[str]
    """The class of the draft, as ``module:class``."""
    drafting: ClassVar[str]
    """The class with which decoding runs it, as ``module:class``."""

    @property
    def draft(self) -> "type[Draft]":
        """The network; imported on first use."""
        return pkgutil.resolve_name(self.network)  # type: ignore[no-any-return]

    @property
    def session(self) -> "type[DraftSession]":
        """The class with which decoding runs it; imported on first use."""
        return pkgutil.resolve_name(self.drafting)  # type: ignore[no-any-return]

    @property
    def architecture(self) -> str:
        return self.draft.ARCHITECTURE

    def own_fields(self, shape: Any) -> dict[str, Any]:
        """The fields that other architectures do not have."""
        return {}

    @abstractmethod
    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> DraftShape:
        """The shape, from ``numbers`` of :class:`DraftShape` and the architecture's own fields."""


def number(config: dict[str, Any], key: str, where: Path, *kinds: type) -> Any:
    """``config[key]``, above 0, an int or one of ``kinds``; raises KeyError if missing, UserError if something else."""
    value = config[key]
    if type(value) not in (int, *kinds) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def numbers_for(config: "DraftConfig | None", target_config: Any) -> dict[str, Any]:
    """The fields of :class:`DraftShape`: those of one of the target's layers, unless ``config`` sets them.

    Raises:
        UserError: the target's rotary embedding cannot be a draft's.
    """
    heads = target_config.num_attention_heads
    numbers = {
        "hidden_size": target_config.hidden_size,
        "intermediate_size": getattr(target_config, "intermediate_size", None) or 4 * target_config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(target_config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        "num_layers": 1,
    }
    chosen = {name: getattr(config, name, None) for name in numbers}
    numbers |= {name: value for name, value in chosen.items() if value is not None}
    theta = getattr(config, "rope_theta", None)
    rope = rope_like(target_config, numbers["head_dim"]) if theta is None else plain_rope(theta)
    # With this length SGLang lets the draft be as long as the target.
    missing = _stretch(getattr(target_config, "rope_parameters", None) or {}) / _stretch(rope)
    return {
        **numbers,
        "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
        "max_positions": int(target_config.max_position_embeddings * max(missing, 1.0)),
        "rope_parameters": rope,
        "vocab_size": target_config.vocab_size,
    }


def _stretch(rope: Rope) -> float:
    """The factor by which SGLang multiplies ``max_position_embeddings``."""
    whole = rope.get("rope_type") == "llama3" or "original_max_position_embeddings" in rope
    return 1.0 if whole else rope.get("factor") or 1.0


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
    rope = getattr(target_config, "rope_parameters", None) or plain_rope(DEFAULT_THETA)
    rope = rope.get("full_attention", rope)
    if sets := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise _refused(f"rope_parameters for {', '.join(sets)}", "one set, or one named full_attention")
    partial = rope.get("partial_rotary_factor") not in (None, 1)
    dropped = ("partial_rotary_factor", "mrope_section", "mrope_interleaved") if partial else ()
    rope = {name: value for name, value in rope.items() if value is not None and name not in dropped}
    match kind := rope.get("rope_type", "default"):
        case "default" | "linear" | "llama3":
            return rope
        case "dynamic":
            # Hunyuan's alpha scales the base for every length; without it nothing is scaled within the context.
            alpha, d = rope.get("alpha") or 1, target_config.head_dim if rope.get("alpha") else head_dim
            return plain_rope(rope["rope_theta"] * alpha ** (d / (d - 2)))
        case "proportional":
            # Linear where it covers the whole head, but SGLang ignores its factor.
            plain, factor = plain_rope(rope["rope_theta"]), rope.get("factor", 1.0)
            return plain if factor == 1 else plain | {"rope_type": "linear", "factor": factor}
        case "yarn":
            return _yarn(rope, target_config.max_position_embeddings, head_dim)
        case "longrope":
            return _longrope(rope, target_config.max_position_embeddings, head_dim)
    raise _refused(f"rope_type {kind!r}", "default, linear, llama3, dynamic, proportional, yarn or longrope")


def _yarn(rope: Rope, positions: int, head_dim: int) -> Rope:
    """SGLang assumes factor 1 where none is set, and reads ``attn_factor``, relative to the one that it infers."""
    rope = rope | {"factor": rope.get("factor") or positions / rope["original_max_position_embeddings"]}
    applied = _attention_factor(rope, positions, head_dim)
    without = {name: value for name, value in rope.items() if name != "attention_factor"}
    inferred = _attention_factor(without, positions, head_dim)
    return rope if math.isclose(applied, inferred) else rope | {"attn_factor": applied / inferred}


def _longrope(rope: Rope, positions: int, head_dim: int) -> Rope:
    """Both sets of factors are the long one, so that it does not matter when which one applies."""
    factors, original = rope["long_factor"], rope["original_max_position_embeddings"]
    if len(factors) != head_dim // 2:
        raise _refused(f"longrope with {len(factors)} factors", f"{head_dim // 2}, for heads of {head_dim} features")
    applied = _attention_factor(rope, positions, head_dim)
    rope = rope | {"short_factor": factors, "attention_factor": applied}
    inferred = math.sqrt(1 + math.log(max(positions / original, 1.0)) / math.log(original))
    return rope if math.isclose(applied, inferred) else rope | {"short_mscale": applied, "long_mscale": applied}


def _attention_factor(rope: Rope, positions: int, head_dim: int) -> float:
    """The factor of cosines and sines."""
    # Slow to import, and not needed to read a config.json.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    like = LlamaConfig(head_dim=head_dim, max_position_embeddings=positions, rope_parameters=dict(rope))
    return float(ROPE_INIT_FUNCTIONS[rope["rope_type"]](like)[1])


def _refused(rope: str, expected: str) -> UserError:
    return UserError(
        f"the target has {rope}, and a draft can follow {expected}: set draft.rope_theta, e.g. 10000, for a plain "
        "rotation of the draft's own"
    )
