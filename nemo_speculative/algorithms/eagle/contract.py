"""The shape of an EAGLE-1 or EAGLE-2 draft, and its ``config.json``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_speculative.algorithms.common.contract import Contract
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing torch or Hydra
    from nemo_speculative.algorithms.common.draft import Draft
    from nemo_speculative.algorithms.common.drafting import DraftSession


@dataclass(frozen=True, kw_only=True)
class EagleShape(DraftShape):
    """The sizes of the network; the hidden size is the target's."""


class EagleContract(Contract):
    """The contract of EAGLE-1 and EAGLE-2 drafts."""

    algorithm = "EAGLE"

    @property
    def draft(self) -> "type[Draft]":
        from nemo_speculative.algorithms.eagle.network import EagleDraft

        return EagleDraft

    @property
    def session(self) -> "type[DraftSession]":
        from nemo_speculative.algorithms.eagle.drafting import EagleSession

        return EagleSession

    def own_fields(self, shape: EagleShape) -> dict[str, Any]:
        return {}

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> EagleShape:
        if "eagle_config" in config:
            raise UserError(
                f"{where}: architectures is [{self.architecture!r}], but eagle_config belongs to EAGLE-3; served as "
                "the former it would accept nothing"
            )
        return EagleShape(**numbers)
