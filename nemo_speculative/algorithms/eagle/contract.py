"""``config.json`` of a served EAGLE-1 or EAGLE-2 draft."""

from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.common.contract import Contract
from nemo_speculative.algorithms.eagle.drafting import EagleSession
from nemo_speculative.algorithms.eagle.network import EagleDraft, EagleShape
from nemo_speculative.utils.errors import UserError


class EagleContract(Contract):
    """EAGLE-1 and EAGLE-2."""

    draft = EagleDraft
    session = EagleSession

    def own_fields(self, shape: EagleShape) -> dict[str, Any]:
        return {}

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> EagleShape:
        if "eagle_config" in config:
            raise UserError(
                f"{where}: architectures is [{self.architecture!r}], but eagle_config belongs to EAGLE-3; served as "
                "the former it would accept nothing"
            )
        return EagleShape(**numbers)
