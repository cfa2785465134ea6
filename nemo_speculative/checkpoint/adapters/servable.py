"""Any known draft as a servable checkpoint in memory, with what it does not remember filled in."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_speculative.checkpoint.adapters.format import ForeignDraft
from nemo_speculative.checkpoint.adapters.read import read_foreign, stated_target
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.schema import ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.embedding_and_head import text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError


def as_servable(
    path: Path, target: str | None, settings: SpeculativeSettings, aux_layers: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Servable, ForeignDraft]:  # fmt: skip
    """The draft in ``path``, and what reading it noted.

    Args:
        target: directory or hub name; None: what the draft says itself.
        settings: how it is served, where it does not remember.

    Raises:
        UserError: the draft or its target cannot be read, or nobody says which target it was trained for.
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
