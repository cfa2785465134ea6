"""Strict reading and writing of servable checkpoints: ``config.json`` and ``model.safetensors`` as SGLang reads them.

SGLang silently skips tensors that it does not know and leaves missing ones uninitialized.  Names, shapes, dtypes and
the fields of the configuration are therefore checked here, in both directions.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_speculative import __version__
from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.checkpoint.contract import Contract, contract_of, fields_of, shape_of
from nemo_speculative.checkpoint.metadata import OWN_KEY, Provenance, find_model, provenance_of, read_config
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import fsync

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Servable:
    """A draft in memory, from a checkpoint of this project or another's."""

    directory: Path
    contract: Contract
    shape: Any
    provenance: Provenance
    tensors: Tensors
    """The weights under the names of the network, in the dtypes of the file."""
    format: str = OWN_KEY
    """Name of the format that it was read from."""
    notes: tuple[str, ...] = ()
    """One line for each assumption and each tensor left out."""

    @property
    def algorithm(self) -> str:
        """SGLang's name of the algorithm."""
        return self.contract.algorithm

    @property
    def aux_layers(self) -> list[int]:
        """The target's layers whose outputs the draft reads."""
        return list(getattr(self.shape, "aux_layers", ()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the draft's largest matrices."""
        return self.tensors["fc.weight"].dtype

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
        """The network with these weights, in eval mode; ``dtype`` None keeps that of the file."""
        draft = self.contract.draft(self.shape).to(dtype or self.dtype)
        draft.load_state_dict(self.tensors)
        return draft.to(device).eval().requires_grad_(False)


def read_servable(path: str | Path) -> Servable:
    """The checkpoint at ``path``, see :func:`find_model`; raises UserError if it is not what SGLang expects."""
    directory = find_model(path)
    config, weights = read_config(directory), directory / "model.safetensors"
    contract, shape = shape_of(config, directory / "config.json")
    tensors = read_tensors(weights)
    check_tensors(contract, tensors, shape, weights)
    return Servable(directory, contract, shape, provenance_of(config, directory), tensors)


def read_tensors(file: Path) -> Tensors:
    """The tensors of a safetensors file; raises UserError if it is damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cut off or not readable ({error})") from None


def write_servable(
    directory: Path, draft: type[Draft], tensors: Tensors, shape: DraftShape, provenance: Provenance,
    dtype: torch.dtype, special_ids: dict[str, Any],
) -> None:  # fmt: skip
    """Writes ``config.json`` and ``model.safetensors``, with the same checks as reading.

    Args:
        dtype: of the floating-point tensors in the file.
        special_ids: further fields of ``config.json``: the ids that start and end a text.

    Raises:
        UserError: SGLang would misread it; nothing is written then.
    """
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    contract = contract_of(draft)
    own = {**asdict(provenance), "version": __version__}
    config = {**fields_of(contract, shape, dtype), **special_ids, OWN_KEY: own}
    check_tensors(contract, cast, shape_of(config, directory)[1], directory)
    write_model_files(directory, config, cast)


def write_model_files(directory: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Writes ``config.json`` and ``model.safetensors``, unchecked; both are on disk when it returns."""
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors' own class for an error of the file system
        raise OSError(str(error)) from error
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        fsync(directory / name)


def check_tensors(contract: Contract, tensors: Tensors, shape: DraftShape, where: Path) -> None:
    """Raises UserError naming each tensor that is missing, surplus, malformed or an inconsistent vocabulary map."""
    with torch.device("meta"):
        expected = contract.draft(shape).state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        reference, tensor = expected[name], tensors[name]
        if reference.shape != tensor.shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(reference.shape)}")
        elif tensor.dtype not in (DTYPES if reference.is_floating_point() else (reference.dtype,)):
            problems.append(f"{name} is {tensor.dtype}, expected {reference.dtype}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if not problems and "d2t" in expected:
        d2t, t2d = tensors["d2t"].cpu(), tensors["t2d"].cpu()
        ids = torch.arange(len(d2t)) + d2t
        if ids[0] < 0 or ids[-1] >= len(t2d) or (ids.diff() <= 0).any():
            problems = ["d2t does not give ascending target ids as offsets (target id = j + d2t[j])"]
        elif not torch.equal(ids, t2d.nonzero().flatten()):
            problems = ["t2d does not mark the ids of d2t"]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
