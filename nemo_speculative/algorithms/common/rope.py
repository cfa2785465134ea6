"""How a draft rotates: as the target's full attention does, said so that training and every server do the same.

Two things stand between a target's ``rope_parameters`` and that.  Two kinds (dynamic, longrope) change with the longest
sequence at hand, which in training is a matter of packing, and in a server of who else is being served.  And SGLang
(read in 0.5.9 and 0.5.23) reads some keys otherwise than transformers does, or not at all, in its classes of drafts.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_speculative.utils.errors import UserError

Rope = dict[str, Any]
DEFAULT_THETA = 10000.0
OF_THE_WHOLE_HEAD = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What does not hold where the whole head turns."""


def plain_rope(theta: float) -> Rope:
    """The rotation of RoFormer (2104.09864)."""
    return {"rope_type": "default", "rope_theta": theta}


def rope_like(target_config: Any, head_dim: int) -> Rope:
    """``rope_parameters`` of a draft whose heads have ``head_dim`` features.

    The cosines and sines are the target's (of its full attention), with these exceptions: a target that turns a part
    of each head has a draft that turns the whole head, by the same base; dynamic is what it is up to
    ``max_position_embeddings``; longrope has its long factors at any length.

    Raises:
        UserError: the target's rotation cannot be a draft's.
    """
    rope = _full_attention(target_config)
    kind = rope.get("rope_type", "default")
    if kind not in _FORMS:
        raise _refused(f"rope_type {kind!r}", f"one of {', '.join(_FORMS)}")
    return _FORMS[kind](_of_the_whole_head(rope), target_config, head_dim)


def positions_like(target_config: Any, rope: Rope) -> int:
    """``max_position_embeddings`` with which SGLang lets a draft that rotates by ``rope`` be as long as the target."""
    missing = _stretch(getattr(target_config, "rope_parameters", None) or {}) / _stretch(rope)
    return int(target_config.max_position_embeddings * max(missing, 1.0))


def _stretch(rope: Rope) -> float:
    """What SGLang multiplies it with."""
    whole = rope.get("rope_type") == "llama3" or "original_max_position_embeddings" in rope
    return 1.0 if whole else rope.get("factor") or 1.0


def _full_attention(config: Any) -> Rope:
    rope = getattr(config, "rope_parameters", None) or plain_rope(DEFAULT_THETA)
    rope = rope.get("full_attention", rope)
    if several := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise _refused(f"rope_parameters for {', '.join(several)}", "one set, or one named full_attention")
    return {name: value for name, value in rope.items() if value is not None}


def _of_the_whole_head(rope: Rope) -> Rope:
    if rope.get("partial_rotary_factor", 1) == 1:
        return rope
    return {name: value for name, value in rope.items() if name not in OF_THE_WHOLE_HEAD}


def _as_it_is(rope: Rope, config: Any, head_dim: int) -> Rope:
    return rope


def _dynamic(rope: Rope, config: Any, head_dim: int) -> Rope:
    """Hunyuan's alpha stretches the base once and for all; without it nothing is stretched within the context."""
    alpha, d = rope.get("alpha") or 1, config.head_dim if rope.get("alpha") else head_dim
    return plain_rope(rope["rope_theta"] * alpha ** (d / (d - 2)))


def _yarn(rope: Rope, config: Any, head_dim: int) -> Rope:
    """SGLang takes 1 for a factor that is not stated, and says ``attn_factor``, relative to what it infers."""
    factor = rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"]
    rope = rope | {"factor": factor}
    applied = _attention_factor(rope, config, head_dim)
    inferred = _attention_factor(
        {name: value for name, value in rope.items() if name != "attention_factor"}, config, head_dim
    )
    return rope if math.isclose(applied, inferred) else rope | {"attn_factor": applied / inferred}


def _longrope(rope: Rope, config: Any, head_dim: int) -> Rope:
    """Both sets of factors are the long one, so that it does not matter which of them is taken when."""
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
    """Of the whole head it is linear; SGLang overlooks its factor."""
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    return plain_rope(theta) if factor == 1 else plain_rope(theta) | {"rope_type": "linear", "factor": factor}


_FORMS: dict[str, Callable[[Rope, Any, int], Rope]] = {
    "default": _as_it_is,
    "linear": _as_it_is,
    "llama3": _as_it_is,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def _attention_factor(rope: Rope, config: Any, head_dim: int) -> float:
    """What cosines and sines are multiplied with."""
    like = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=config.max_position_embeddings, rope_parameters=dict(rope)
    )
    return float(ROPE_INIT_FUNCTIONS[rope["rope_type"]](like)[1])


def _refused(found: str, expected: str) -> UserError:
    return UserError(
        f"the target has {found}, and a draft can follow {expected}: set draft.rope_theta, e.g. 10000, for a plain "
        "rotation of the draft's own"
    )
