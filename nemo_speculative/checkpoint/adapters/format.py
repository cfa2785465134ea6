"""What a format of drafts is, and what reading one gives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.checkpoint.adapters.files import Source, Tensors
from nemo_speculative.checkpoint.metadata import Provenance


@dataclass(frozen=True)
class ForeignDraft:
    """A draft that was read, as this project has it."""

    format: str
    """The name of the format it was in."""
    directory: Path
    """Where its files are."""
    draft: type[Draft]
    shape: Any
    tensors: Tensors
    """Under the names of ``draft``'s state dict, in the dtypes of the file."""
    notes: tuple[str, ...] = ()
    """What was not stated and therefore assumed, and what was left out: a line each."""
    step: int = 0
    """Optimizer steps it was trained for; 0 where that is not stated."""
    provenance: Provenance | None = None
    """What a checkpoint of this project remembers; others have none."""

    @property
    def dtype(self) -> torch.dtype:
        """That of its largest matrices."""
        return self.tensors["fc.weight"].dtype

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
        """The network with these weights, in eval mode; ``dtype`` null keeps that of the file."""
        network = self.draft(self.shape).to(dtype or self.dtype)
        network.load_state_dict(self.tensors)
        return network.to(device).eval().requires_grad_(False)


@dataclass
class Reading:
    """One draft while it is read."""

    source: Source
    target: Any
    """The target's transformers configuration (the text part of it)."""
    aux_layers: Sequence[int] | None = None
    """What the user says of them; it is believed before the file."""
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> Path:
        return self.source.directory / "config.json"


class Format(ABC):
    """One project's layout of a draft on disk."""

    name: ClassVar[str]

    @abstractmethod
    def recognises(self, source: Source) -> bool:
        """Whether ``source`` is in this format."""

    def target(self, source: Source) -> str | None:
        """The target that it says it was trained for: a directory or a hub name."""
        return None

    @abstractmethod
    def read(self, reading: Reading) -> ForeignDraft:
        """The draft.

        Raises:
            UserError: it is damaged, was made for another target, or is a network that cannot be served.
        """
