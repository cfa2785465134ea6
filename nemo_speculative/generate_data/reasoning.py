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
        tags: what opens and what closes it; the opening one may be what the prompt ends with.
    """

    def __init__(self, tags: Sequence[str] = ("<think>", "</think>")):
        self.opening, self.closing = tags

    @abstractmethod
    def applied(self, message: Message, prompt: str = "") -> Message:
        """The assistant's ``message`` as the conversation keeps it; ``prompt``: what it answers, or the end of that."""

    def parted(self, text: str, prompt: str) -> tuple[str, str] | None:
        """Reasoning and the rest; None: there is none.  One that was cut off has no rest.

        A text that merely mentions a tag is none: the answer opens with the reasoning, or the prompt did.
        """
        if not text.lstrip().startswith(self.opening) and not prompt.rstrip().endswith(self.opening):
            return None
        before, _, rest = text.partition(self.closing)
        return before.strip().removeprefix(self.opening).strip(), rest.lstrip()


class Keep(Reasoning):
    """It stays in the content."""

    def applied(self, message: Message, prompt: str = "") -> Message:
        return message


class Split(Reasoning):
    """It becomes ``reasoning_content``; the chat template decides which turns see it."""

    def applied(self, message: Message, prompt: str = "") -> Message:
        if message.get("reasoning_content"):  # split off by who answered
            return message
        parted = self.parted(message["content"] or "", prompt)
        return message if parted is None else {**message, "content": parted[1], "reasoning_content": parted[0]}


class Drop(Split):
    """No later turn sees it."""

    def applied(self, message: Message, prompt: str = "") -> Message:
        return {key: value for key, value in super().applied(message, prompt).items() if key != "reasoning_content"}
