"""The servable directory: ``config.json`` and ``model.safetensors`` as SGLang reads them.

SGLang skips tensors that it does not know and leaves missing ones unfilled without a word, so what is written and what
is read is checked here, strictly: names, shapes, dtypes and the fields of the configuration.
"""

import json
import os
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
from nemo_speculative.utils.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Servable:
    """A checkpoint read back."""

    directory: Path
    contract: Contract
    shape: Any
    provenance: Provenance
    tensors: dict[str, torch.Tensor]

    @property
    def algorithm(self) -> str:
        return self.contract.draft.ALGORITHM

    @property
    def aux_layers(self) -> list[int]:
        """Which of the target's layers it reads."""
        return list(getattr(self.shape, "aux_layers", ()))

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
        """The draft with its weights, in eval mode; ``dtype`` null keeps that of the file."""
        draft = self.contract.draft(self.shape).to(dtype or self.tensors["fc.weight"].dtype)
        draft.load_state_dict(self.tensors)
        return draft.to(device).eval().requires_grad_(False)


def config_of(
    contract: Contract, shape: DraftShape, provenance: Provenance, dtype: torch.dtype, special_ids: dict[str, Any]
) -> dict[str, Any]:
    """The contents of ``config.json``."""
    return {
        **fields_of(contract, shape, dtype),
        **special_ids,
        OWN_KEY: {**asdict(provenance), "version": __version__},
    }


def check_tensors(contract: Contract, tensors: dict[str, torch.Tensor], shape: DraftShape, where: Path) -> None:
    """Refuses tensors that are missing, surplus, of another shape or dtype, or a d2t that is not an ascending offset.

    Raises:
        UserError: naming every offending tensor.
    """
    with torch.device("meta"):
        expected = contract.draft(shape).state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        want, found = expected[name], tensors[name]
        if want.shape != found.shape:
            problems.append(f"{name} is {list(found.shape)}, expected {list(want.shape)}")
        elif found.dtype not in (DTYPES if want.is_floating_point() else (want.dtype,)):
            problems.append(f"{name} is {found.dtype}, expected {want.dtype}")
        elif found.is_floating_point() and not found.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if not problems and contract.expected_ids(shape):
        problems = _vocabulary_problems(tensors["d2t"], tensors["t2d"])
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def _vocabulary_problems(d2t: torch.Tensor, t2d: torch.Tensor) -> list[str]:
    ids = torch.arange(len(d2t)) + d2t.cpu()
    if ids[0] < 0 or ids[-1] >= len(t2d) or (ids.diff() <= 0).any():
        return ["d2t does not give ascending target ids as offsets (target id = j + d2t[j])"]
    inside = torch.zeros_like(t2d.cpu())
    inside[ids] = True
    return [] if torch.equal(inside, t2d.cpu()) else ["t2d does not mark the ids of d2t"]


def write_servable(
    directory: Path, draft: type[Draft], tensors: dict[str, torch.Tensor], shape: DraftShape, provenance: Provenance,
    dtype: torch.dtype, special_ids: dict[str, Any],
) -> None:  # fmt: skip
    """Writes ``config.json`` and ``model.safetensors``, checked as the reader checks them.

    Raises:
        UserError: SGLang would misread it; nothing is written then.
        OSError: the disk is full or not writable.
    """
    cast = {k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in tensors.items()}
    contract = contract_of(draft)
    config = config_of(contract, shape, provenance, dtype, special_ids)
    check_tensors(contract, cast, shape_of(config, directory)[1], directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        save_file(cast, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # wraps what the file system said
        raise OSError(str(error)) from error
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        _sync(directory / name)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_servable(path: str | Path) -> Servable:
    """Reads and checks the checkpoint at ``path``: a run directory, a ``step_<N>`` directory or its ``model/``.

    Raises:
        UserError: there is none, it is cut off, or it is not what SGLang expects.
    """
    directory = find_model(path)
    config = read_config(directory)
    contract, shape = shape_of(config, directory / "config.json")
    try:
        tensors = load_file(directory / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory}/model.safetensors: cut off or not readable ({error})") from None
    check_tensors(contract, tensors, shape, directory / "model.safetensors")
    return Servable(directory, contract, shape, provenance_of(config, directory), tensors)
