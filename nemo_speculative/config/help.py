"""The text of ``--help``: what a recipe does, its commands, and the config groups with their options.

Hydra's own help composes the configuration and copies its store once per group, which takes ten seconds here.
"""

import textwrap
from typing import Any

import yaml

from nemo_speculative.config.conf_dir import CONF, options

NOT_CHOSEN = ("hydra", "model_draft")
"""Groups that no user chooses from."""
FOOTER = """\
Keys      KEY=VALUE overrides any key, e.g. trainer.max_steps=100; --cfg job prints every key with its value, and
          docs/configuration.md explains them.
Sweeps    --multirun KEY=A,B runs every combination.
Your own  hydra.searchpath=[file:///DIR] adds the YAML files of DIR to the groups.
"""


def help_text(root: str, description: str) -> str:
    """The help of the recipe with the root configuration ``root``; ``description`` is the recipe's docstring."""
    choices = _choices(root)
    width = max(map(len, choices), default=0) + 2
    lines = [description.strip(), "", "Groups    GROUP=OPTION chooses one; * is the default"]
    for group, default in choices.items():
        names = ", ".join(f"{name}*" if name == default else name for name in options(group))
        lines += textwrap.wrap(
            names, 120, initial_indent=f"  {group:{width}}", subsequent_indent=" " * (width + 2), break_on_hyphens=False
        )
    return "\n".join([*lines, "", FOOTER])


def _choices(root: str) -> dict[str, Any]:
    """Each group that ``root`` composes, with its default option; roots may extend one another."""
    result: dict[str, Any] = {}
    for entry in yaml.safe_load((CONF / f"{root}.yaml").read_text())["defaults"]:
        if isinstance(entry, dict):
            for group, option in entry.items():
                group = group.rpartition(" ")[2].lstrip("/")
                if group not in NOT_CHOSEN and (CONF / group).is_dir():
                    result[group] = option
        elif (CONF / f"{entry}.yaml").is_file():
            result |= _choices(entry)
    return result
