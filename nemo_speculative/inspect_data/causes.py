"""Why what a training renders is not what a chat server renders: the usual causes, told from both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_speculative.data import chat_template
from nemo_speculative.data.chat_template import Message


@dataclass(frozen=True)
class Case:
    """A prompt that differs."""

    tokenizer: Any
    messages: list[Message]
    """Those before the answer."""
    has_tools: bool
    trained: list[int]
    """The whole conversation as it is trained on."""
    served: list[int]
    """The prompt as it is served."""
    bare: list[int] | None
    """The same by our own template without its generation prompt; None: the template refuses that."""
    position: int
    """Of the first token that differs."""

    @property
    def texts(self) -> tuple[str, str]:
        """Trained and served."""
        return self.tokenizer.decode(self.trained), self.tokenizer.decode(self.served)

    @property
    def openings(self) -> tuple[str, str]:
        """What stands before the first question, trained and served; nothing where the question cannot be found."""
        question = next((str(m["content"]).strip() for m in self.messages if m["role"] == "user"), "")
        trained, served = self.texts
        if not question or question not in trained or question not in served:
            return "", ""
        return trained.partition(question)[0], served.partition(question)[0]

    @property
    def thoughts(self) -> list[str]:
        return [thought for message in self.messages if (thought := thinking(message))]


def thinking(message: Message) -> str:
    """What the assistant thought before it said ``message``."""
    within = str(message.get("content") or "").partition("</think>")
    return message.get("reasoning_content") or (within[0].removeprefix("<think>").strip() if within[1] else "")


def _doubled_start(case: Case) -> bool:
    start = case.tokenizer.bos_token_id
    doubled = [ids[:2] == [start, start] for ids in (case.trained, case.served)]
    return start is not None and doubled[0] != doubled[1]


def _same_text(case: Case) -> bool:
    trained, served = case.texts
    return trained.startswith(served)


def _generation_prompt(case: Case) -> bool:
    return case.bare is not None and case.position >= len(case.bare) and case.served[: len(case.bare)] == case.bare


def _opening(case: Case) -> bool:
    trained, served = case.openings
    return trained != served


def _thinking(case: Case) -> bool:
    trained, served = case.texts
    return any((thought in trained) != (thought in served) for thought in case.thoughts)


CAUSES: dict[str, Callable[[Case], bool]] = {
    "two answers in a row: a server takes the first for the user's": lambda case: (
        case.messages[-1]["role"] == "assistant"
    ),
    "the start token is doubled": _doubled_start,
    "the same text in other tokens": _same_text,
    "the generation prompt is not how the answer begins": _generation_prompt,
    "tools are written otherwise": lambda case: case.has_tools and _opening(case),
    "something else before the first question, as a default system prompt or a date": _opening,
    "the thinking of earlier turns is on one side only": _thinking,
}
"""Asked in this order; the first that holds is the cause."""
NO_QUESTION = "the assistant speaks first: no server is asked for that"
REFUSED = "the server refuses the prompt"
ANSWER_CHANGES = "an answer is rendered otherwise once more turns follow, as templates do that drop earlier thinking"
MASK = "the mask does not begin where the model does"
UNKNOWN = "for another reason"


def cause_of(case: Case) -> str:
    """The first of :data:`CAUSES` that holds."""
    return next((name for name, holds in CAUSES.items() if holds(case)), UNKNOWN)


def as_served(messages: list[Message]) -> list[Message]:
    """``messages`` as SGLang 0.5.23 hands them to the template: a last answer is taken for the user's."""
    seen = chat_template.normalize_messages(messages)
    if seen and seen[-1]["role"] == "assistant":
        seen[-1] = {"role": "user", "content": seen[-1]["content"]}
    return seen
