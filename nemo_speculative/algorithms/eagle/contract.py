"""The shape of an EAGLE-1 or EAGLE-2 draft, and its ``config.json``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.common.contract import Contract, DraftShape
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EagleShape(DraftShape):
    """The sizes of the network; the hidden size is the target's."""


class EagleContract(Contract):
    """The contract of EAGLE-1 and EAGLE-2 drafts."""

    algorithm = "EAGLE"
    network = "nemo_speculative.algorithms.eagle.network:EagleDraft"
    drafting = "nemo_speculative.algorithms.eagle.drafting:EagleSession"

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> EagleShape:
        if "eagle_config" in config:
            raise UserError(
                f"{where}: architectures is [{self.architecture!r}], but eagle_config belongs to EAGLE-3; served as "
                "the former it would accept nothing"
            )
        return EagleShape(**numbers)
