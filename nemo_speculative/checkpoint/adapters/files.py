"""The files of another project's draft: where they are, and reading them without running anything in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from yaml import YAMLError

from nemo_speculative.checkpoint.metadata import find_model, read_config
from nemo_speculative.utils.errors import UserError

Tensors = dict[str, torch.Tensor]

INNER = (".", "model", "model/consolidated", "consolidated")
"""Where a draft lies in the directory that is given: itself, or NeMo AutoModel's inner ones."""
SHARDS_ONLY = "model/.hf_metadata"
"""What NeMo AutoModel leaves where it wrote its training shards and nothing else."""


@dataclass(frozen=True)
class Source:
    """A directory with ``config.json`` and weights, read when they are asked for."""

    directory: Path
    file: Path
    """The weights."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.directory)

    @cached_property
    def tensors(self) -> Tensors:
        """All of them, on the CPU.

        Raises:
            UserError: a file is damaged, missing, or would have to run code to be read.
        """
        return READERS[self.file.name](self.file)

    @property
    def architecture(self) -> str:
        """The first of ``architectures``, or nothing."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def open_source(path: str | Path) -> Source:
    """The draft in ``path``: a directory of a known layout, or of a run of this project.

    Raises:
        UserError: there is none.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(f"{given} does not exist; expected the directory of a draft")
    for directory in (given / inner for inner in INNER):
        weights = next((directory / name for name in READERS if (directory / name).is_file()), None)
        if weights and (directory / "config.json").is_file():
            return Source(directory, weights)
    if (given / SHARDS_ONLY).is_dir():
        raise UserError(
            f"{given} holds NeMo AutoModel's shards only; let it consolidate them first (save_consolidated)"
        )
    return _of_a_run(given)


def _of_a_run(given: Path) -> Source:
    try:
        model = find_model(given)
    except UserError:
        raise UserError(
            f"{given} holds no draft; expected config.json and one of {', '.join(READERS)}, in it or in its model/"
        ) from None
    return Source(model, model / "model.safetensors")


def read_safetensors(file: Path) -> Tensors:
    """The tensors of one file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cut off or not readable ({_line(error)})") from None


def read_sharded(index: Path) -> Tensors:
    """The tensors of the files that ``index`` names, which lie beside it.

    Raises:
        UserError: the index or a file is damaged or missing.
    """
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index}: not a usable index ({_line(error)}); expected weight_map of names to files"
        ) from None
    beside = [name for name in named if isinstance(name, str) and Path(name).name == name]
    if len(beside) != len(named):
        raise UserError(f"{index}: names {sorted(map(str, named))}; expected files that lie beside it")
    parts = [read_safetensors(index.parent / name) for name in sorted(beside)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def read_pickled(file: Path) -> Any:
    """What ``torch.save`` wrote, tensors and plain containers only.

    Raises:
        UserError: it is damaged, or holds anything that reading would have to run.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # one class per way in which a file can be damaged
        raise UserError(
            f"{file}: not read: damaged, or a pickle of more than tensors, which would run code ({_line(error)}); "
            "save it as safetensors where it was made"
        ) from None


def read_pickled_tensors(file: Path) -> Tensors:
    """The same for a file that is to map names to tensors."""
    found = read_pickled(file)
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{file}: holds {type(found).__name__} of other things; expected names and their tensors")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def read_yaml(file: Path, key: str) -> Any:
    """The value of ``key``, which has dots, in plain terms; None where there is none.

    Raises:
        UserError: it is no plain YAML.
    """
    try:
        found = OmegaConf.select(OmegaConf.load(file), key)
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not plain YAML ({_line(error)})") from None


READERS: dict[str, Callable[[Path], Tensors]] = {
    "model.safetensors": read_safetensors,
    "model.safetensors.index.json": read_sharded,
    "pytorch_model.bin": read_pickled_tensors,
    "draft_model.pt": read_pickled_tensors,
}
"""The files that hold weights, in the order in which they are looked for."""


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:100] or type(error).__name__
