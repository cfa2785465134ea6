"""Drafts of any known format: read, and converted to another form."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from nemo_speculative.checkpoint.adapters.exports import Export
from nemo_speculative.checkpoint.adapters.formats import Own, format_of
from nemo_speculative.checkpoint.adapters.source import open_source
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.schema import ConvertJob, ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.describe import text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_directory


def read_foreign(path: str | Path, target_config: Any, aux_layers: Sequence[int] | None = None) -> Servable:
    """Reads the draft in ``path``, whichever project wrote it; another project's has a provenance of the step only.

    Args:
        path: its directory; NeMo AutoModel's outer or inner one; a run of this project.
        target_config: the target's transformers configuration (the text part of it).
        aux_layers: layers of the target whose outputs an EAGLE-3 draft reads, where its files lack or misstate them.

    Raises:
        UserError: there is no draft, or it is damaged, made for another target, or of a kind that cannot be served.
    """
    source = open_source(path)
    source.target, source.aux_layers = target_config, aux_layers
    return format_of(source).read(source)


def as_servable(
    path: Path, target: str | None, settings: SpeculativeSettings, aux_layers: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> Servable:  # fmt: skip
    """The draft in ``path`` with its whole provenance; raises UserError if it or its target cannot be read.

    Args:
        target: directory or hub name; None: the one that the draft names.
        settings: speculative settings for a draft that records none.
    """
    source = open_source(path)
    source_format = format_of(source)
    name = target or source_format.target(source)
    if name is None:
        raise UserError(f"target is not set, and {path} does not say which it was trained for: give target=DIR")
    directory = resolve_target(ModelConfig(path=name, trust_remote_code=trust_remote_code), key="target")
    config = text_config(directory, trust_remote_code)
    source.target, source.aux_layers = config, aux_layers
    draft = source_format.read(source)
    if isinstance(source_format, Own):
        return draft
    local = Path(name).expanduser()
    provenance = Provenance(
        target=str(local.resolve()) if local.is_dir() else name,
        target_fingerprint=target_fingerprint(directory),
        target_dtype="float32" if config.dtype in (None, torch.float32) else "bfloat16",
        speculative=settings,
        step=draft.provenance.step,
    )
    return replace(draft, provenance=provenance)


def convert_draft(job: ConvertJob) -> Servable:
    """Writes the draft ``job.checkpoint`` in another form into a new directory, which appears complete or not at all.

    Returns:
        The draft with the new directory.

    Raises:
        UserError: the draft or its target cannot be read, the form cannot hold it, or the directory exists.
    """
    export: Export = instantiate(job.form)
    checkpoint = Path(os.path.abspath(Path(job.checkpoint).expanduser()))
    default_output = checkpoint.with_name(f"{checkpoint.name}-{export.suffix}")
    output = Path(job.output).expanduser() if job.output else default_output
    if output.exists():
        raise UserError(f"output: {output} exists; remove it, or name another with output=DIR")
    draft = as_servable(checkpoint, job.target, job.exporter.speculative, job.aux_layers, job.trust_remote_code)
    config = text_config(resolve_target(ModelConfig(path=draft.provenance.target)), job.trust_remote_code)
    dtype = getattr(torch, job.exporter.dtype.value) if job.exporter.dtype else draft.dtype
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in draft.tensors.items()}
    with atomic_directory(output) as partial:
        export.write(partial, replace(draft, tensors=tensors), config)
    return replace(draft, directory=output)
