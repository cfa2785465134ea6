"""What every form of export is."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from nemo_speculative.checkpoint.draft_checkpoint import Servable


class Export(ABC):
    """A form in which a draft is written."""

    suffix: ClassVar[str]
    """What its directory is called after, beside the draft's own."""

    @abstractmethod
    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        """Writes ``servable`` into ``directory``, which is made.

        Args:
            servable: its tensors are written in the dtypes that they have.
            target: the target's transformers configuration (the text part of it).

        Raises:
            UserError: this form has no place for such a draft; nothing is written then.
            OSError: the disk is full or not writable.
        """


def special_ids(target: Any) -> dict[str, Any]:
    """The ids that begin and end a text, as ``config.json`` names them."""
    return {"bos_token_id": target.bos_token_id, "eos_token_id": target.eos_token_id}
