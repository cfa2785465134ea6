"""Values as expressions over the target's configuration, in a YAML file or, in quotes, on the command line:
``"draft.intermediate_size='${mul:2,${target:hidden_size}}'"``.

OmegaConf resolvers, never ``eval``: ``target`` reads a field of the target's config.json (``target:rope.theta`` one
inside another), ``mul`` multiplies, ``div`` divides exactly; ``default_data`` is the group data's default for a model.
"""

import math
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from nemo_speculative.utils.errors import UserError


def register_resolvers() -> None:
    """Makes the resolvers known to OmegaConf."""
    OmegaConf.register_new_resolver("target", _target_field, replace=True)
    OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("div", _divide, replace=True)
    OmegaConf.register_new_resolver("default_data", lambda m: "tiny" if m == "tiny" else "default", replace=True)


def _target_field(key: str, *, _root_: DictConfig) -> Any:
    # By name, as every _target_: it is above this package, and imports transformers, which --help does without.
    target_config = get_method("nemo_speculative.targets.describe.target_config")
    value: Any = target_config(OmegaConf.to_object(_root_.model)).to_dict()
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"${{target:{key}}}: the target's config.json has no {part!r}")
        value = value[part]
    return value


def _divide(dividend: int, divisor: int) -> int:
    if divisor == 0 or dividend % divisor:
        raise UserError(f"${{div:{dividend},{divisor}}}: {dividend} cannot be divided evenly by {divisor}")
    return dividend // divisor
