"""What becomes of the reasoning that an answer opens with, in the conversation that later turns see.

The ids of an answer hold it whatever is chosen here: they are what the target generated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


class Reasoning(ABC):
    """
    Args:
        tags: what opens and what closes it; the opening one may stand in the prompt.
    """

    def __init__(self, tags: Sequence[str] = ("<think>", "</think>")):
        self.opening, self.closing = tags

    @abstractmethod
    def applied(self, message: Message) -> Message:
        """The assistant's ``message`` as the conversation keeps it."""

    def parted(self, text: str) -> tuple[str, str] | None:
        """Reasoning and the rest; None: there is none.  One that was cut off has no rest."""
        before, closed, rest = text.partition(self.closing)
        if not closed and not text.lstrip().startswith(self.opening):
            return None
        return before.strip().removeprefix(self.opening).strip(), rest.lstrip()


class Keep(Reasoning):
    """It stays in the content."""

    def applied(self, message: Message) -> Message:
        return message


class Split(Reasoning):
    """It becomes ``reasoning_content``; the chat template decides which turns see it."""

    def applied(self, message: Message) -> Message:
        parted = self.parted(message["content"] or "")
        return message if parted is None else {**message, "content": parted[1], "reasoning_content": parted[0]}


class Drop(Split):
    """No later turn sees it."""

    def applied(self, message: Message) -> Message:
        return {key: value for key, value in super().applied(message).items() if key != "reasoning_content"}
