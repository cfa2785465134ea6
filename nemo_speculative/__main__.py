"""The command ``nemo-speculative``: its subcommands are the recipes and the two servers.

nemo-speculative train-eagle3 model=local model.path=DIR data.path=FILE      as python recipes/train_eagle3.py …
nemo-speculative SUBCOMMAND --help                                           commands, config groups and options
"""

import runpy
import sys
from pathlib import Path

_INSTALLED = Path(__file__).parent / "recipes"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "recipes"
SERVERS = ("serve_sglang", "serve_target")


def main() -> None:
    """Runs the recipe or server that the first argument names, with the other arguments."""
    recipes = {file.stem: file for file in sorted(RECIPES.glob("*.py"))}
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name in recipes:
        del sys.argv[1]
        sys.argv[0] = str(recipes[name])
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif name in SERVERS:
        del sys.argv[1]
        runpy.run_module(f"nemo_speculative.{name}", run_name="__main__", alter_sys=True)
    else:
        asked_for_help = name in ("", "__help", "_h")
        print(_usage(recipes), file=sys.stdout if asked_for_help else sys.stderr)
        if not asked_for_help:
            print(f"error: {sys.argv[1]}: no such subcommand", file=sys.stderr)
            sys.exit(2)


def _usage(recipes: dict[str, Path]) -> str:
    lines = ["usage: nemo-speculative SUBCOMMAND [GROUP=OPTION] [KEY=VALUE]", ""]
    for name, file in recipes.items():
        summary = file.read_text().splitlines()[0].strip('"')
        lines.append(f"  {name.replace('_', '-'):18}{summary}")
    lines.append(f"  {'serve-sglang':18}Serve a draft with its target on SGLang.")
    lines.append(f"  {'serve-target':18}Serve a target's hidden states to trainings elsewhere.")
    return "\n".join([*lines, "", "SUBCOMMAND --help lists its commands, config groups and options."])


if __name__ == "__main__":
    main()
