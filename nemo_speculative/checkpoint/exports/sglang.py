"""The servable directory, from a draft that another project trained."""

from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.draft_checkpoint import Servable, write_servable
from nemo_speculative.checkpoint.exports.base import Export, special_ids


class SGLangExport(Export):
    """What SGLang serves, and every program of this project reads."""

    suffix = "servable"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        write_servable(
            directory, servable.contract.draft, servable.tensors, servable.shape, servable.provenance,
            servable.tensors["fc.weight"].dtype, special_ids(target),
        )  # fmt: skip
