"""Drafts on disk, in the layout of any project, read without running any code of theirs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.checkpoint.draft_checkpoint import Tensors, read_tensors
from nemo_speculative.checkpoint.metadata import find_model, read_config
from nemo_speculative.utils.errors import UserError, describe_error

INNER_DIRECTORIES = (".", "model", "model/consolidated", "consolidated")
"""Places of a draft in the given directory: the directory itself, or those of NeMo AutoModel."""


@dataclass
class Source:
    """A directory with ``config.json`` and weights, which are read on first use, and the inputs of reading it."""

    directory: Path
    weights: Path
    """The file of the weights, or the index of several files."""
    target: Any = None
    """The target's transformers configuration (the text part of it)."""
    aux_layers: Sequence[int] | None = None
    """The user's choice, which takes precedence over the file."""
    notes: list[str] = field(default_factory=list)
    """One line for each assumption and each tensor left out."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.directory)

    @cached_property
    def tensors(self) -> Tensors:
        """All tensors, on the CPU; raises UserError if a file is damaged, missing, or would have to run code."""
        return READERS[self.weights.name](self.weights)

    @property
    def architecture(self) -> str:
        """The first of ``architectures``, or an empty string."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def where(self) -> Path:
        """The file that errors name."""
        return self.directory / "config.json"

    def require(self, holds: bool, key: str, value: Any, expected: str) -> None:
        """Raises UserError about the value of ``key`` in the configuration unless the condition ``holds``."""
        if not holds:
            raise UserError(f"{self.where}: {key} is {value!r}, expected {expected}")


def open_source(path: str | Path) -> Source:
    """The draft in ``path``, a directory of a known format or of a run of this project; raises UserError if none."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{root} does not exist; expected the directory of a draft")
    for directory in (root / inner for inner in INNER_DIRECTORIES):
        weights = next((directory / name for name in READERS if (directory / name).is_file()), None)
        if weights and (directory / "config.json").is_file():
            return Source(directory, weights)
    if (root / "model/.hf_metadata").is_dir():  # next to training shards
        raise UserError(f"{root} holds NeMo AutoModel's shards only; let it consolidate them first (save_consolidated)")
    try:
        model = find_model(root)
    except UserError:
        raise UserError(
            f"{root} holds no draft; expected config.json and one of {', '.join(READERS)}, in it or in its model/"
        ) from None
    return Source(model, model / "model.safetensors")


def _read_sharded(index: Path) -> Tensors:
    """The tensors of the files that ``index`` names, all in its directory."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index}: not a usable index ({describe_error(error, 100)}); expected weight_map of names to files"
        ) from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: names {sorted(map(str, names))}; expected files in the same directory")
    tensors: Tensors = {}
    for name in sorted(names):
        tensors |= read_tensors(index.parent / name)
    return tensors


def read_pickled(file: Path) -> Any:
    """The contents of a ``torch.save`` file; raises UserError if it holds more than tensors and plain containers."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another class
        raise UserError(
            f"{file}: not read: damaged, or a pickle of more than tensors, which would run code "
            f"({describe_error(error, 100)}); save it as safetensors where it was made"
        ) from None


def _read_pickled_tensors(file: Path) -> Tensors:
    content = read_pickled(file)
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{file}: holds {type(content).__name__} of other things; expected names and their tensors")
    return {str(name): tensor.detach() for name, tensor in content.items()}


READERS: dict[str, Callable[[Path], Tensors]] = {
    "model.safetensors": read_tensors,
    "model.safetensors.index.json": _read_sharded,
    "pytorch_model.bin": _read_pickled_tensors,
    "draft_model.pt": _read_pickled_tensors,
}
"""Weight files by name, in the order in which they are looked for."""
