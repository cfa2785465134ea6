"""The base class of the contract between a draft and its server, and the readers of ``config.json`` fields."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing torch
    from nemo_speculative.algorithms.common.draft import Draft
    from nemo_speculative.algorithms.common.drafting import DraftSession


class Contract(ABC):
    """A served architecture: its draft class, its drafting, and its fields of ``config.json``."""

    algorithm: ClassVar[str]
    """SGLang's --speculative-algorithm."""

    @property
    @abstractmethod
    def draft(self) -> "type[Draft]":
        """The network; imported on first use."""

    @property
    @abstractmethod
    def session(self) -> "type[DraftSession]":
        """The class with which decoding runs it; imported on first use."""

    @property
    def architecture(self) -> str:
        return self.draft.ARCHITECTURE

    @abstractmethod
    def own_fields(self, shape: Any) -> dict[str, Any]:
        """The fields that other architectures do not have."""

    @abstractmethod
    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> DraftShape:
        """The shape, from ``numbers`` of :class:`DraftShape` and the architecture's own fields."""

    def expected_ids(self, shape: Any) -> bool:
        """Whether the checkpoint holds d2t and t2d."""
        return False


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


def switch(config: dict[str, Any], name: str, where: Path) -> bool:
    """``config[name]``, true or false; false where it is missing.

    Raises:
        UserError: it is something else.
    """
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}, expected true or false")
    return value
