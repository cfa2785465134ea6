"""Reader of NeMo AutoModel's checkpoints: ``epoch_<E>_step_<S>/``, the draft in ``model/consolidated`` or ``model``.

Its first version wrote a bare ``draft_model.pt`` and the vocabulary to a separate file.  The configuration is a copy of
the target's with a few fields changed: num_hidden_layers is still the target's, and the aux layers are recorded only in
the copy of the training configuration.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.checkpoint.adapters.base import (
    ForeignDraft,
    Format,
    Reading,
    Source,
    Tensors,
    read_pickled,
    read_yaml,
)
from nemo_speculative.checkpoint.adapters.networks import read_eagle, read_eagle3
from nemo_speculative.checkpoint.adapters.safeailab_specforge import plain_eagle3
from nemo_speculative.utils.errors import UserError

EAGLE3_ARCHITECTURE, EAGLE_ARCHITECTURE = "LlamaEagle3DraftModel", "LlamaEagleDraftModel"
PREFIX = "model."
METADATA = ("eagle_meta.pt", "eagle3_meta.pt")
RECIPE = "config.yaml"


class AutoModel(Format):
    """The format of NeMo AutoModel."""

    name = "NeMo AutoModel"

    def recognizes(self, source: Source) -> bool:
        known = source.architecture in (EAGLE3_ARCHITECTURE, EAGLE_ARCHITECTURE)
        return known or any(name.startswith(f"{PREFIX}fc.") for name in source.tensors)

    def target(self, source: Source) -> str | None:
        target = _recipe(source, "target_model_name_or_path") or source.config.get("_name_or_path")
        return target if isinstance(target, str) and target else None

    def read(self, reading: Reading) -> ForeignDraft:
        source = reading.source
        if source.architecture == EAGLE_ARCHITECTURE:
            return read_eagle(self.name, reading)
        metadata = _metadata(source)
        tensors = source.tensors | _vocabulary(reading, metadata)
        layout = plain_eagle3(reading, tensors, PREFIX)
        if layout.aux_layers is None and reading.aux_layers is None:
            layout = replace(layout, aux_layers=_recipe(source, "aux_layer_ids"))
        step = metadata.get("global_step", 0)
        return read_eagle3(self.name, reading, layout, tensors, step if type(step) is int and step >= 0 else 0)


def _outer(source: Source, name: str) -> Path | None:
    """The file ``name`` of the training checkpoint that contains ``source``."""
    candidates = (source.directory, *source.directory.resolve().parents[:2])
    return next((directory / name for directory in candidates if (directory / name).is_file()), None)


def _recipe(source: Source, key: str) -> Any:
    """The value of ``key`` in the copy of the training configuration."""
    file = _outer(source, RECIPE)
    return read_yaml(file, f"recipe_args.{key}") if file else None


def _metadata(source: Source) -> dict[str, Any]:
    file = next((path for name in METADATA if (path := _outer(source, name))), None)
    metadata = read_pickled(file) if file else {}
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: holds {type(metadata).__name__}, expected selected_token_ids by name")
    return metadata


def _vocabulary(reading: Reading, metadata: dict[str, Any]) -> Tensors:
    """d2t from the metadata, where the weights do not hold it."""
    ids = metadata.get("selected_token_ids")
    if "d2t" in reading.source.tensors or not isinstance(ids, torch.Tensor):
        return {}
    reading.notes.append("the draft vocabulary is that of its metadata, selected_token_ids")
    return {"d2t": ids.long() - torch.arange(ids.numel())}
