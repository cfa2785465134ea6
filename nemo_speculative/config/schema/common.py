"""Checks and types that several groups share."""

from enum import Enum
from typing import Any

from nemo_speculative.utils.errors import UserError


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def require(holds: bool, message: str) -> None:
    """Raises a :class:`UserError` with ``message`` unless ``holds``."""
    if not holds:
        raise UserError(message)


def require_positive(config: Any, group: str, *names: str) -> None:
    """Refuses the keys ``names`` of ``group`` at or below 0; null passes: the default is decided elsewhere."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{group}.{name} is {value}: it must be greater than 0")


def require_not_negative(config: Any, group: str, *names: str) -> None:
    """Refuses the keys ``names`` of ``group`` below 0."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{group}.{name} is {value}: it must not be negative")
