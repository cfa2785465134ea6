"""Which of the target's layers and ids a draft uses."""

import re
from dataclasses import dataclass
from typing import Any

from nemo_speculative.utils.errors import UserError

LARGEST_AUTO = 32000
COVERAGE = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class VocabularySize:
    """How large a draft vocabulary is to be."""

    entries: int | None
    """None: as many as ``coverage`` takes."""
    coverage: float = 1.0
    """Share of the supervised tokens, from 0 to 1."""
    own_head: bool = True
    """False: the target's head gives the logits."""


def parse_vocab_size(value: Any, target_vocab_size: int) -> VocabularySize:
    """``draft.vocab_size`` for a target of ``target_vocab_size``.

    Raises:
        UserError: it is of no known form, or larger than the target's.
    """
    if value == "auto":
        return VocabularySize(min(LARGEST_AUTO, target_vocab_size))
    if value in ("full", "target_head"):
        return VocabularySize(target_vocab_size, own_head=value == "full")
    share = COVERAGE.fullmatch(value) if isinstance(value, str) else None
    if share and 0 < float(share[1]) <= 100:
        return VocabularySize(None, float(share[1]) / 100)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(
            f"draft.vocab_size is {value!r}: expected a number above 0, a coverage such as 99.5%, full, target_head or "
            "auto"
        )
    if value > target_vocab_size:
        raise UserError(
            f"draft.vocab_size is {value}, larger than the target's vocabulary of {target_vocab_size}: "
            f"set draft.vocab_size={target_vocab_size} or less, or auto"
        )
    return VocabularySize(value)


def aux_layers_for(num_layers: int, chosen: list[int] | None) -> list[int]:
    """The aux layers of a target of ``num_layers`` decoder layers.

    ``chosen``, or the published formula [1, N//2 - 1, N - 4] (EAGLE-3, algorithm as released; 0-based outputs).

    Raises:
        UserError: a layer is out of range, or the formula gives the same layer twice (fewer than 7 layers).
    """
    if chosen is None:
        layers = [1, num_layers // 2 - 1, num_layers - 4]
        if len(set(layers)) < 3 or min(layers) < 0 or layers != sorted(layers):
            raise UserError(
                f"the target has {num_layers} layers, too few for the default aux layers [1, N//2 - 1, N - 4] = "
                f"{layers}; list them, e.g. draft.aux_layers={_spread(num_layers)}"
            )
        return layers
    # The output of the last layer is not captured by SGLang (it reads layer inputs).
    wrong = [layer for layer in chosen if not 0 <= layer < num_layers - 1]
    if wrong:
        raise UserError(
            f"draft.aux_layers holds {wrong[0]}: the target has {num_layers} layers, so 0 to {num_layers - 2} can be "
            "captured"
        )
    return list(chosen)


def _spread(num_layers: int) -> list[int]:
    return sorted({0, max(num_layers // 2 - 1, 0), max(num_layers - 2, 0)})
