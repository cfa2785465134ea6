"""Which format a draft is in, and reading it whatever that is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.adapters.automodel import AutoModel
from nemo_speculative.checkpoint.adapters.files import Source, open_source
from nemo_speculative.checkpoint.adapters.format import ForeignDraft, Format, Reading
from nemo_speculative.checkpoint.adapters.llama import SafeAILab, SpecForge
from nemo_speculative.checkpoint.adapters.own import Own
from nemo_speculative.checkpoint.adapters.speculators import Speculators
from nemo_speculative.utils.errors import UserError

FORMATS: tuple[Format, ...] = (Own(), Speculators(), AutoModel(), SpecForge(), SafeAILab())
"""In the order in which they are asked: the ones with marks of their own first."""


def detect(path: str | Path) -> str:
    """The name of the format of the draft in ``path``, one of ``FORMATS``.

    Raises:
        UserError: there is no draft, it is damaged, or of no known format.
    """
    return _format_of(open_source(path)).name


def stated_target(path: str | Path) -> str | None:
    """The target that the draft in ``path`` says it was trained for: a directory or a hub name; None: it does not say.

    Raises:
        UserError: as :func:`detect`.
    """
    source = open_source(path)
    return _format_of(source).target(source)


def read_foreign(path: str | Path, target_config: Any, aux_layers: Sequence[int] | None = None) -> ForeignDraft:
    """The draft in ``path``, whichever project wrote it, in the terms of this one.

    Args:
        path: its directory; NeMo AutoModel's outer or inner one; a run of this project.
        target_config: the target's transformers configuration (the text part of it).
        aux_layers: layers of the target whose outputs an EAGLE-3 draft reads, where its files do not say, or wrongly.

    Raises:
        UserError: there is no draft, it is of no known format, damaged, made for another target, or of a kind that
            cannot be served.
    """
    source = open_source(path)
    return _format_of(source).read(Reading(source, target_config, aux_layers))


def _format_of(source: Source) -> Format:
    for known in FORMATS:
        if known.recognises(source):
            return known
    names = ", ".join(sorted(source.tensors)[:3]) or "no tensors"
    raise UserError(
        f"{source.directory}: no known draft: architectures is {source.config.get('architectures')!r}, with {names}; "
        f"expected one of {', '.join(known.name for known in FORMATS)}"
    )
