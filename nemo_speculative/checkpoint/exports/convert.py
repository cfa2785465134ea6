"""A draft of any known format, written anew in the form that is asked for."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate

from nemo_speculative.checkpoint.adapters.format import ForeignDraft
from nemo_speculative.checkpoint.adapters.servable import as_servable
from nemo_speculative.checkpoint.exports.base import Export
from nemo_speculative.config.schema import ConvertJob, ModelConfig
from nemo_speculative.targets.embedding_and_head import text_config
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """What was done."""

    directory: Path
    """Where the draft now is."""
    format: str
    """The format that it was read from."""
    notes: tuple[str, ...]
    """What was assumed or left out."""


def convert_draft(job: ConvertJob) -> Conversion:
    """Reads ``job.checkpoint``, which stays as it is, and writes it into a directory that did not exist.

    Raises:
        UserError: the draft or its target cannot be read, the form has no place for it, or the directory exists.
        OSError: the disk is full or not writable.
    """
    export: Export = instantiate(job.form)
    given = Path(os.path.abspath(Path(job.checkpoint).expanduser()))
    output = Path(job.output).expanduser() if job.output else given.with_name(f"{given.name}-{export.suffix}")
    if output.exists():
        raise UserError(f"output: {output} exists; remove it, or name another with output=DIR")
    servable, draft = as_servable(given, job.target, job.exporter.speculative, job.aux_layers, job.trust_remote_code)
    config = text_config(resolve_target(ModelConfig(path=servable.provenance.target)), job.trust_remote_code)
    servable = dataclasses.replace(servable, tensors=_cast(draft, job))
    _write_whole(output, lambda directory: export.write(directory, servable, config))
    return Conversion(output, draft.format, draft.notes)


def _cast(draft: ForeignDraft, job: ConvertJob) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, job.exporter.dtype.value) if job.exporter.dtype else draft.dtype
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in draft.tensors.items()}


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """The directory appears with everything in it, or not at all."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
