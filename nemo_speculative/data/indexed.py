"""Sequences whose elements are made when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Indexed(Sequence[T]):
    """What has a length and an element for each index below it; a slice is a list of them."""

    @abstractmethod
    def _item(self, index: int) -> T:
        """The element at 0 <= ``index`` < len(self)."""

    def _slice(self, indices: range) -> Sequence[T]:
        return [self._item(index) for index in indices]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))
