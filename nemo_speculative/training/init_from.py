"""``draft.init_from``: starting from a draft that was trained before, here or by another project."""

from pathlib import Path
from typing import Any

from hydra.utils import get_class

from nemo_speculative.checkpoint.convert import read_foreign
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.config.schema import DraftConfig
from nemo_speculative.utils.errors import UserError

NUMBERS = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_layers", "fc_norm",
    "norm_before_fc", "norm_output",
)  # fmt: skip


def read_init_from(config: DraftConfig, target_config: Any) -> Servable | None:
    """The draft that ``draft.init_from`` names, or None.

    Raises:
        UserError: it cannot be read, or is of another algorithm.
    """
    if config.init_from is None:
        return None
    start = read_foreign(Path(config.init_from).expanduser(), target_config, getattr(config, "aux_layers", None))
    draft: type = get_class(config._target_)
    if not issubclass(draft, stored := start.contract.draft):
        raise UserError(
            f"draft.init_from: {start.directory} is a {stored.__name__}, and draft._target_ a {draft.__name__}; "
            "choose the draft group of its algorithm"
        )
    return start


def use_init_shape(config: DraftConfig, start: Servable) -> DraftConfig:
    """``config`` with the shape of ``start``.

    Raises:
        UserError: ``config`` sets another shape.
    """
    known = {name: getattr(start.shape, name) for name in NUMBERS if hasattr(config, name)}
    numbers = {name: value for name, value in known.items() if value is not False}
    if hasattr(start.shape, "aux_layers"):
        entries = start.shape.draft_vocab_size
        numbers |= {"aux_layers": list(start.shape.aux_layers), "vocab_size": entries or "target_head"}
    return config.with_numbers(numbers, f"draft.init_from ({start.directory})")
