"""Checks and types that several groups share."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from nemo_speculative.utils.errors import UserError

Dtype = StrEnum("Dtype", ["float32", "bfloat16"])


def require_positive(config: Any, group: str, *names: str) -> None:
    """Refuses values of the keys ``names`` of ``group`` (empty: the root) at or below 0; null passes."""
    for key, value in _values(config, group, names):
        if not value > 0:
            raise UserError(f"{key} is {value}: it must be greater than 0")


def require_within(interval: str, config: Any, group: str, *names: str) -> None:
    """Refuses values of the keys ``names`` of ``group`` outside ``interval``, e.g. ``[0, 1)``; null passes."""
    low, high = map(float, interval[1:-1].split(","))
    for key, value in _values(config, group, names):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise UserError(f"{key} is {value}: expected a number in {interval}")


def _values(config: Any, group: str, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The full key and the value of each of ``names`` that is not null."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            yield f"{group}.{name}" if group else name, value
