"""Base classes of the checkpoint formats of other projects, and the reading of their files without running any code."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from yaml import YAMLError

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.checkpoint.draft_checkpoint import Servable, write_model_files
from nemo_speculative.checkpoint.metadata import Provenance, find_model, read_config
from nemo_speculative.utils.errors import UserError

Tensors = dict[str, torch.Tensor]

INNER_DIRECTORIES = (".", "model", "model/consolidated", "consolidated")
"""Places of a draft in the given directory: the directory itself, or those of NeMo AutoModel."""
SHARDS_ONLY = "model/.hf_metadata"
"""The directory that marks a NeMo AutoModel checkpoint with training shards only."""


@dataclass(frozen=True)
class Source:
    """A directory with ``config.json`` and weights, which are read on first use."""

    directory: Path
    file: Path
    """The file of the weights, or the index of several files."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.directory)

    @cached_property
    def tensors(self) -> Tensors:
        """All tensors, on the CPU.

        Raises:
            UserError: a file is damaged, missing, or would have to run code to be read.
        """
        return READERS[self.file.name](self.file)

    @property
    def architecture(self) -> str:
        """The first of ``architectures``, or an empty string."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


@dataclass(frozen=True)
class ForeignDraft:
    """A draft read from any format, with this project's names and shapes."""

    format: str
    """Name of the format that it was read from."""
    directory: Path
    draft: type[Draft]
    shape: Any
    tensors: Tensors
    """The weights under the names of ``draft``'s state dict, in the dtypes of the file."""
    notes: tuple[str, ...] = ()
    """One line for each assumption and each tensor left out."""
    step: int = 0
    """Optimizer steps it was trained for; 0 where that is not stated."""
    provenance: Provenance | None = None
    """Recorded in checkpoints of this project only."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the draft's largest matrices."""
        return self.tensors["fc.weight"].dtype

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
        """The network with these weights, in eval mode; ``dtype`` None keeps that of the file."""
        network = self.draft(self.shape).to(dtype or self.dtype)
        network.load_state_dict(self.tensors)
        return network.to(device).eval().requires_grad_(False)


@dataclass
class Reading:
    """Inputs of reading one draft, and the notes collected on the way."""

    source: Source
    target: Any
    """The target's transformers configuration (the text part of it)."""
    aux_layers: Sequence[int] | None = None
    """The user's choice, which takes precedence over the file."""
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> Path:
        """The file that errors name."""
        return self.source.directory / "config.json"


class Format(ABC):
    """The checkpoint format of one project."""

    name: ClassVar[str]

    @abstractmethod
    def recognizes(self, source: Source) -> bool:
        """Whether ``source`` is in this format."""

    def target(self, source: Source) -> str | None:
        """The target that the checkpoint names: a directory or a hub name."""
        return None

    @abstractmethod
    def read(self, reading: Reading) -> ForeignDraft:
        """Reads the draft.

        Raises:
            UserError: it is damaged, was made for another target, or is a network that cannot be served.
        """


class Export(ABC):
    """A form in which a draft is written."""

    suffix: ClassVar[str]
    """Suffix that forms the default directory name from the draft's."""

    @abstractmethod
    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        """Writes ``servable`` into ``directory``, which is empty.

        Args:
            servable: its tensors are written in the dtypes that they have.
            target: the target's transformers configuration (the text part of it).

        Raises:
            UserError: this form cannot hold such a draft; nothing is written then.
            OSError: the disk is full or not writable.
        """


def write_exported(directory: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Writes ``config.json`` and ``model.safetensors`` into the new ``directory``.

    Raises:
        OSError: the disk is full or not writable.
    """
    write_model_files(directory, config, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def open_source(path: str | Path) -> Source:
    """The draft in ``path``: a directory of a known format, or of a run of this project.

    Raises:
        UserError: there is none.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{root} does not exist; expected the directory of a draft")
    for directory in (root / inner for inner in INNER_DIRECTORIES):
        weights = next((directory / name for name in READERS if (directory / name).is_file()), None)
        if weights and (directory / "config.json").is_file():
            return Source(directory, weights)
    if (root / SHARDS_ONLY).is_dir():
        raise UserError(f"{root} holds NeMo AutoModel's shards only; let it consolidate them first (save_consolidated)")
    try:
        model = find_model(root)
    except UserError:
        raise UserError(
            f"{root} holds no draft; expected config.json and one of {', '.join(READERS)}, in it or in its model/"
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
    """The tensors of the files that ``index`` names, all in its directory.

    Raises:
        UserError: the index or a file is damaged or missing.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index}: not a usable index ({_line(error)}); expected weight_map of names to files"
        ) from None
    siblings = [name for name in names if isinstance(name, str) and Path(name).name == name]
    if len(siblings) != len(names):
        raise UserError(f"{index}: names {sorted(map(str, names))}; expected files in the same directory")
    shards = [read_safetensors(index.parent / name) for name in sorted(siblings)]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def read_pickled(file: Path) -> Any:
    """The contents of a ``torch.save`` file of tensors and plain containers.

    Raises:
        UserError: it is damaged, or holds other objects, whose reading would run code.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another class
        raise UserError(
            f"{file}: not read: damaged, or a pickle of more than tensors, which would run code ({_line(error)}); "
            "save it as safetensors where it was made"
        ) from None


def read_pickled_tensors(file: Path) -> Tensors:
    """The tensors of a ``torch.save`` file that maps names to tensors.

    Raises:
        UserError: as :func:`read_pickled`, or it holds something else.
    """
    content = read_pickled(file)
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{file}: holds {type(content).__name__} of other things; expected names and their tensors")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def read_yaml(file: Path, key: str) -> Any:
    """The value of the dotted ``key``, as plain containers; None where it is missing.

    Raises:
        UserError: the file is not plain YAML.
    """
    try:
        value = OmegaConf.select(OmegaConf.load(file), key)
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not plain YAML ({_line(error)})") from None


READERS: dict[str, Callable[[Path], Tensors]] = {
    "model.safetensors": read_safetensors,
    "model.safetensors.index.json": read_sharded,
    "pytorch_model.bin": read_pickled_tensors,
    "draft_model.pt": read_pickled_tensors,
}
"""Weight files by name, in the order in which they are looked for."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
