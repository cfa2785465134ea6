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
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.checkpoint.contract import Contract, contract_of, fields_of, shape_of
from nemo_speculative.checkpoint.metadata import OWN_KEY, Provenance, find_model, provenance_of, read_config
from nemo_speculative.checkpoint.run_dir import fsync
from nemo_speculative.utils.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Servable:
    """A checkpoint in memory."""

    directory: Path
    contract: Contract
    shape: Any
    provenance: Provenance
    tensors: dict[str, torch.Tensor]

    @property
    def algorithm(self) -> str:
        """SGLang's name of the algorithm."""
        return self.contract.algorithm

    @property
    def aux_layers(self) -> list[int]:
        """The target's layers whose outputs the draft reads."""
        return list(getattr(self.shape, "aux_layers", ()))

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
        """The draft with its weights, in eval mode; ``dtype`` None keeps that of the file."""
        draft = self.contract.draft(self.shape).to(dtype or self.tensors["fc.weight"].dtype)
        draft.load_state_dict(self.tensors)
        return draft.to(device).eval().requires_grad_(False)


def read_servable(path: str | Path) -> Servable:
    """Reads and checks the checkpoint at ``path``: a run directory, a ``step_<N>`` directory or its ``model/``.

    Raises:
        UserError: there is none, it is cut off, or it is not what SGLang expects.
    """
    directory = find_model(path)
    config, weights = read_config(directory), directory / "model.safetensors"
    contract, shape = shape_of(config, directory / "config.json")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: cut off or not readable ({error})") from None
    check_tensors(contract, tensors, shape, weights)
    return Servable(directory, contract, shape, provenance_of(config, directory), tensors)


def write_servable(
    directory: Path, draft: type[Draft], tensors: dict[str, torch.Tensor], shape: DraftShape, provenance: Provenance,
    dtype: torch.dtype, special_ids: dict[str, Any],
) -> None:  # fmt: skip
    """Writes ``config.json`` and ``model.safetensors``, with the same checks as reading.

    Args:
        dtype: of the floating-point tensors in the file.
        special_ids: further fields of ``config.json``: the ids that start and end a text.

    Raises:
        UserError: SGLang would misread it; nothing is written then.
        OSError: the disk is full or not writable.
    """
    cast = {k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in tensors.items()}
    contract = contract_of(draft)
    config = {
        **fields_of(contract, shape, dtype),
        **special_ids,
        OWN_KEY: {**asdict(provenance), "version": __version__},
    }
    check_tensors(contract, cast, shape_of(config, directory)[1], directory)
    write_model_files(directory, config, cast)


def write_model_files(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes ``config.json`` and ``model.safetensors``, unchecked; both are on disk when it returns.

    Raises:
        OSError: the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors' own class for an error of the file system
        raise OSError(str(error)) from error
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        fsync(directory / name)


def check_tensors(contract: Contract, tensors: dict[str, torch.Tensor], shape: DraftShape, where: Path) -> None:
    """Refuses tensors that are missing, surplus, of another shape or dtype, and inconsistent vocabulary maps.

    Raises:
        UserError: naming every offending tensor.
    """
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
    if not problems and contract.expected_ids(shape):
        d2t, t2d = tensors["d2t"].cpu(), tensors["t2d"].cpu()
        ids = torch.arange(len(d2t)) + d2t
        if ids[0] < 0 or ids[-1] >= len(t2d) or (ids.diff() <= 0).any():
            problems = ["d2t does not give ascending target ids as offsets (target id = j + d2t[j])"]
        else:
            mask = torch.zeros_like(t2d)
            mask[ids] = True
            problems = [] if torch.equal(mask, t2d) else ["t2d does not mark the ids of d2t"]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
