"""Generates docs/configuration.md from the schema:
``python -m tools.configuration_reference > docs/configuration.md``."""

import ast
import dataclasses
import inspect
import itertools
import re
from enum import Enum
from types import NoneType
from typing import Any, Union, get_args, get_origin

from omegaconf import MISSING

from nemo_speculative.config.groups import CONF, JOBS, PACKAGES, SCHEMAS, options

HEAD = """# Configuration

Generated from `nemo_speculative/config/schema/` by `python -m tools.configuration_reference`; do not edit.

A recipe composes one option of each group of `conf/`, whose files show every key with its value; every key below can
be overridden on the command line (`trainer.max_steps=100`), every group replaced (`optimizer=muon`), and swept
(`--multirun seed=0,1,2`, which writes to `<output_dir>/<number>`). `experiment=NAME` is a complete recipe of
`conf/experiment/`. `--help` lists the groups with their options, `--cfg job` prints the composed configuration,
`plan=true` what it would do. An unknown key, a wrong type and a contradiction are one line and exit code 1.

YAML files of your own: `hydra.searchpath=[file:///DIR]` adds `DIR/<group>/<option>.yaml` to the groups. On a Slurm
cluster, `pip install "nemo_speculative[slurm]"` and `--multirun hydra/launcher=submitit_slurm
hydra.launcher.partition=NAME hydra.launcher.gpus_per_node=1` submit each run of a sweep as a job of one process;
`launch/slurm.sbatch` starts a training on several GPUs.

The defaults below are the schema's. A YAML file of conf/ may set another one: `--cfg job` prints the values of a run.
"""


def reference() -> str:
    """The text of docs/configuration.md."""
    parts = [HEAD, _options()]
    for name, root in JOBS.items():
        plain = [f for f in dataclasses.fields(root) if not dataclasses.is_dataclass(f.type)]
        folder = "nemo_speculative" if name.startswith("serve") else "recipes"
        parts.append(_section(f"`{folder}/{name}.py`", root, "", plain))
    for group, schemas in SCHEMAS.items():
        shared = dict.fromkeys(b for cls in schemas.values() for b in _bases(cls) if b not in schemas.values())
        named = {f"`{group}`, every option ({base.__name__})": base for base in shared}
        named |= {f"`{group}` ({option})": cls for option, cls in schemas.items()}
        prefix = f"{PACKAGES.get(group, group)}."
        for title, cls in named.items():
            base = cls.__mro__[1]
            also = f"  Also every key of {base.__name__}." if dataclasses.is_dataclass(base) else ""
            parts.append(_section(title, cls, prefix, _own_fields(cls), also))
    return "\n".join(parts)


def _options() -> str:
    """A table of the options of every group, with the first line of their files."""
    rows = []
    for group in sorted(
        folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("hydra", "model_draft")
    ):
        for option in options(group):
            lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
            comment = next(line[2:] for line in lines if line.startswith("# ") and "@package" not in line)
            summary = re.split(r"\s{3,}", comment)[0].rstrip(":")  # an example command follows
            rows.append(f"| `{group}={option}` | {summary} |")
    return "\n".join(["## Options\n", "| option | |", "|---|---|", *rows, ""])


def _bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]


def _own_fields(cls: type) -> list[dataclasses.Field]:
    inherited = {f.name: f.default for base in cls.__mro__[1:-1] for f in dataclasses.fields(base)}
    return [f for f in dataclasses.fields(cls) if f.name not in inherited or inherited[f.name] != f.default]


def _section(title: str, cls: type, prefix: str, fields: list[dataclasses.Field], also: str = "") -> str:
    # dataclass() writes a signature where there is no docstring.
    doc = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else inspect.getdoc(cls)
    rows = [row for f in fields for row in _rows(f, prefix, _documentation(cls))]
    head = [f"## {title}\n", f"{doc}{also}".strip() + "\n", "| key | type | default | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _rows(f: dataclasses.Field, prefix: str, documentation: dict[str, str]) -> list[str]:
    if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
        inner = _documentation(f.type)
        return [row for g in dataclasses.fields(f.type) for row in _rows(g, f"{prefix}{f.name}.", inner)]
    text = documentation.get(f.name, "").replace("|", "\\|")
    return [f"| `{prefix}{f.name}` | {_type(f.type)} | `{_default(f)}` | {text} |"]


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Union:
        return " or ".join("null" if part is NoneType else _type(part) for part in get_args(annotation))
    if get_origin(annotation) is not None:
        return f"{get_origin(annotation).__name__}[{', '.join(map(_type, get_args(annotation)))}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " \\| ".join(member.value for member in annotation)
    return "Any" if annotation is Any else annotation.__name__


def _default(f: dataclasses.Field) -> Any:
    value = f.default_factory() if f.default is dataclasses.MISSING and callable(f.default_factory) else f.default
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "must be given" if value == MISSING else value


def _documentation(cls: type) -> dict[str, str]:
    """The string below each field, of the class and its bases."""
    documentation: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                name, text = statement.target.id, ast.literal_eval(following.value)  # type: ignore[union-attr]
                documentation[name] = " ".join(text.split())
    return documentation


if __name__ == "__main__":
    print(reference(), end="")
