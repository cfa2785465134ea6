"""``draft.config=FILE``: a draft's config.json, as EAGLE and SpecForge publish them, in place of a group's numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import DraftConfig
from nemo_speculative.utils.errors import UserError

KEYS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "draft_vocab_size": "vocab_size",
    "fc_norm": "fc_norm",
    "norm_before_fc": "norm_before_fc",
    "norm_output": "norm_output",
}
"""Keys of such a file and the options that they set; positions and their scaling are the target's."""
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


def apply_config_file(draft: DraftConfig) -> DraftConfig:
    """``draft`` with the numbers of its ``config`` file where it has none of its own.

    Raises:
        UserError: the file cannot be read, describes another kind of draft, or contradicts a key that was set.
    """
    if draft.config is None:
        return draft
    file = Path(draft.config).expanduser()
    return with_numbers(draft, _numbers(file), f"draft.config ({file})")


def with_numbers(draft: DraftConfig, numbers: dict[str, Any], source: str) -> DraftConfig:
    """``draft`` with ``numbers`` where it has none of its own.

    Raises:
        UserError: it has no such key, or its own value contradicts it; ``source`` is named.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(draft)}
    for name, value in numbers.items():
        if name not in defaults:
            raise UserError(f"{source} sets {name}={value!r}, which {type(draft).__name__} does not have")
        configured = getattr(draft, name)
        if configured not in (defaults[name], value):
            raise UserError(f"draft.{name} is {configured!r}, and {source} says {value!r}; leave out one of them")
    return dataclasses.replace(draft, **numbers)


def _numbers(file: Path) -> dict[str, Any]:
    try:
        published = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"draft.config: {file} cannot be read ({error}); expected a draft's config.json") from None
    if not isinstance(published, dict) or "hidden_size" not in published:
        raise UserError(f"draft.config: {file} is not a draft's config.json; expected an object with hidden_size")
    eagle = published.get("eagle_config") or {}
    numbers = {option: {**eagle, **published}.get(key) for key, option in KEYS.items()}
    numbers["aux_layers"] = eagle.get(AUX_LAYERS)
    return {name: value for name, value in numbers.items() if value not in (None, False)}
