"""Drafts of any known format: recognized, read, and converted to another form."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from nemo_speculative.checkpoint.adapters.automodel import AutoModel
from nemo_speculative.checkpoint.adapters.base import Export, ForeignDraft, Format, Reading, Source, open_source
from nemo_speculative.checkpoint.adapters.own import Own
from nemo_speculative.checkpoint.adapters.safeailab_specforge import SafeAILab, SpecForge
from nemo_speculative.checkpoint.adapters.speculators import Speculators
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.schema import ConvertJob, ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.describe import text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_directory

FORMATS: tuple[Format, ...] = (Own(), Speculators(), AutoModel(), SpecForge(), SafeAILab())
"""The known formats in the order in which they are tried: those with unmistakable marks first."""


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion."""

    directory: Path
    """The new directory."""
    format: str
    """Name of the format that the draft was read from."""
    notes: tuple[str, ...]
    """One line for each assumption and each tensor left out."""


def detect_format(path: str | Path) -> str:
    """The name of the format of the draft in ``path``, one of ``FORMATS``.

    Raises:
        UserError: there is no draft, it is damaged, or of no known format.
    """
    return _format_of(open_source(path)).name


def stated_target(path: str | Path) -> str | None:
    """The target that the draft in ``path`` names, a directory or a hub name; None where it names none.

    Raises:
        UserError: as :func:`detect_format`.
    """
    source = open_source(path)
    return _format_of(source).target(source)


def read_foreign(path: str | Path, target_config: Any, aux_layers: Sequence[int] | None = None) -> ForeignDraft:
    """Reads the draft in ``path``, whichever project wrote it.

    Args:
        path: its directory; NeMo AutoModel's outer or inner one; a run of this project.
        target_config: the target's transformers configuration (the text part of it).
        aux_layers: layers of the target whose outputs an EAGLE-3 draft reads, where its files lack or misstate them.

    Raises:
        UserError: there is no draft, it is of no known format, damaged, made for another target, or of a kind that
            cannot be served.
    """
    source = open_source(path)
    return _format_of(source).read(Reading(source, target_config, aux_layers))


def _format_of(source: Source) -> Format:
    for candidate in FORMATS:
        if candidate.recognizes(source):
            return candidate
    names = ", ".join(sorted(source.tensors)[:3]) or "no tensors"
    raise UserError(
        f"{source.directory}: no known draft: architectures is {source.config.get('architectures')!r}, with {names}; "
        f"expected one of {', '.join(candidate.name for candidate in FORMATS)}"
    )


def as_servable(
    path: Path, target: str | None, settings: SpeculativeSettings, aux_layers: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Servable, ForeignDraft]:  # fmt: skip
    """The draft in ``path`` as a servable checkpoint in memory, and as it was read.

    Args:
        target: directory or hub name; None: the one that the draft names.
        settings: speculative settings for a draft that records none.

    Raises:
        UserError: the draft or its target cannot be read, or the target is unknown.
    """
    name = target or stated_target(path)
    if name is None:
        raise UserError(f"target is not set, and {path} does not say which it was trained for: give target=DIR")
    directory = resolve_target(ModelConfig(path=name, trust_remote_code=trust_remote_code), key="target")
    config = text_config(directory, trust_remote_code)
    draft = read_foreign(path, config, aux_layers)
    local = Path(name).expanduser()
    provenance = draft.provenance or Provenance(
        target=str(local.resolve()) if local.is_dir() else name,
        target_fingerprint=target_fingerprint(directory),
        target_dtype="float32" if config.dtype in (None, torch.float32) else "bfloat16",
        speculative=settings,
        step=draft.step,
    )
    return Servable(draft.directory, contract_of(draft.draft), draft.shape, provenance, draft.tensors), draft


def convert_draft(job: ConvertJob) -> Conversion:
    """Writes the draft ``job.checkpoint`` in another form into a new directory, which appears complete or not at all.

    Raises:
        UserError: the draft or its target cannot be read, the form cannot hold it, or the directory exists.
        OSError: the disk is full or not writable.
    """
    export: Export = instantiate(job.form)
    checkpoint = Path(os.path.abspath(Path(job.checkpoint).expanduser()))
    default_output = checkpoint.with_name(f"{checkpoint.name}-{export.suffix}")
    output = Path(job.output).expanduser() if job.output else default_output
    if output.exists():
        raise UserError(f"output: {output} exists; remove it, or name another with output=DIR")
    servable, draft = as_servable(
        checkpoint, job.target, job.exporter.speculative, job.aux_layers, job.trust_remote_code
    )
    config = text_config(resolve_target(ModelConfig(path=servable.provenance.target)), job.trust_remote_code)
    dtype = getattr(torch, job.exporter.dtype.value) if job.exporter.dtype else draft.dtype
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in draft.tensors.items()}
    with atomic_directory(output) as partial:
        export.write(partial, dataclasses.replace(servable, tensors=tensors), config)
    return Conversion(output, draft.format, draft.notes)
