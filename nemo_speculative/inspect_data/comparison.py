"""What a training renders beside what a chat server renders for the same messages, token by token.

For each answer a server is sent the messages before it, and the model goes on from the prompt that it makes of them.
Training agrees with it where that prompt is how the training's row begins, the mask begins behind it, and the answer
is rendered as it is at the end of a conversation: when the model wrote it, nothing followed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_speculative.data.chat_template import Message, prompt_ids, render
from nemo_speculative.data.conversation import Conversation, TokenRow
from nemo_speculative.inspect_data import causes
from nemo_speculative.inspect_data.causes import Case, as_served, cause_of
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused

WINDOW = 8
MOST_OF_A_CAUSE = 5


class ChatServer(Protocol):
    """Who renders prompts."""

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids after which the answer to ``messages`` begins.

        Raises:
            Refused: there are none for these.
            UserError: nor for any others.
        """


@dataclass(frozen=True)
class ByTemplate:
    """What a server does, by reading: the tokenizer's own template."""

    tokenizer: Any

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        try:
            return prompt_ids(self.tokenizer, as_served(messages), "the template", tools)
        except UserError as error:
            raise Refused(str(error)) from None


@dataclass(frozen=True)
class Difference:
    """Where a turn differs for the first time."""

    id: str
    message: int
    """Which message of the conversation is the answer, from 0."""
    position: int
    """In tokens."""
    cause: str
    before: list[str]
    """The tokens up to there, at most eight."""
    trained: list[str]
    served: list[str]
    """The tokens from there on, at most eight each."""
    note: str = ""


@dataclass
class Comparison:
    """What came of it, turn by turn: ``equal + len(differences) = turns``, but for those that are cut off."""

    tokenizer: Any
    server: ChatServer
    max_length: int
    most: int
    """Conversations to compare."""
    conversations: int = 0
    not_comparable: int = 0
    """Rows of token ids, which have no messages, and conversations that the template rejects."""
    turns: int = 0
    equal: int = 0
    cut_off: int = 0
    """Turns whose answer begins behind ``max_length``: never trained, and not among ``turns``."""
    causes: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    """The first ones of each cause."""

    def add(self, item: Conversation | TokenRow, row: TokenRow | None) -> None:
        """
        Args:
            row: of the item, uncut; None: a training has none, and what it would render is compared all the same.

        Raises:
            UserError: the server does not answer.
        """
        if self.conversations + self.not_comparable >= self.most:
            return
        if row is not None:
            trained: list[int] | None = row.input_ids
        else:
            trained = rendered(self.tokenizer, item, item.messages) if isinstance(item, Conversation) else None
        if trained is None or not isinstance(item, Conversation):
            self.not_comparable += 1
            return
        self.conversations += 1
        for turn in (n for n, message in enumerate(item.messages) if message["role"] == "assistant"):
            self._compare(item, turn, trained, row)

    def _compare(self, item: Conversation, turn: int, trained: list[int], row: TokenRow | None) -> None:
        start, found = self._judge(item, turn, trained, row)
        if start >= self.max_length:
            self.cut_off += 1
            return
        self.turns += 1
        if found is None:
            self.equal += 1
            return
        self.causes[found.cause] += 1
        if self.causes[found.cause] <= MOST_OF_A_CAUSE:
            self.differences.append(found)

    def _judge(
        self, item: Conversation, turn: int, trained: list[int], row: TokenRow | None
    ) -> tuple[int, Difference | None]:
        """Where the answer begins, as served, and how the turn differs."""
        before = item.messages[:turn]
        describe = _Describe(self.tokenizer, item.id, turn, trained)
        if not before:
            return 0, describe(0, [], causes.NO_QUESTION)
        try:
            served = self.server.prompt_ids(before, item.tools)
        except Refused as error:
            return 0, describe(0, [], causes.REFUSED, str(error))
        start, at = len(served), agreement(trained, served)
        if at < start:
            return start, describe(at, served, cause_of(self._case(item, before, trained, served, at)))
        after = rendered(self.tokenizer, item, item.messages[: turn + 1]) or []
        at = agreement(trained, after)
        if at < len(after):
            return start, describe(at, after, causes.ANSWER_CHANGES)
        if row is not None and (off := mask_offset(row.loss_mask, start)):
            return start, describe(start, served, causes.MASK, off)
        return start, None

    def _case(self, item: Conversation, before: list[Message], trained: list[int], served: list[int], at: int) -> Case:
        bare = rendered(self.tokenizer, item, as_served(before))
        return Case(self.tokenizer, before, bool(item.tools), trained, served, bare, at)


@dataclass(frozen=True)
class _Describe:
    tokenizer: Any
    id: str
    message: int
    trained: list[int]

    def __call__(self, at: int, served: list[int], cause: str, note: str = "") -> Difference:
        pieces = (self.trained[max(at - WINDOW, 0) : at], self.trained[at : at + WINDOW], served[at : at + WINDOW])
        before, trained, theirs = ([self.tokenizer.decode([i]) for i in ids] for ids in pieces)
        return Difference(self.id, self.message, at, cause, before, trained, theirs, note)


def rendered(tokenizer: Any, item: Conversation, messages: list[Message]) -> list[int] | None:
    """``messages`` of ``item`` without a generation prompt; None: the template rejects them."""
    try:
        return render(tokenizer, messages, item.origin, tools=item.tools)["input_ids"]
    except UserError:
        return None


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def mask_offset(mask: Sequence[bool], start: int) -> str:
    """How far from ``start`` the supervised tokens begin; nothing where they begin there."""
    if start < len(mask) and mask[start]:
        early = next((n for n in range(start) if not mask[start - 1 - n]), start)
        return f"earlier by {early}" if early else ""
    late = next((n for n in range(1, len(mask) - start) if mask[start + n]), None)
    return f"later by {late}" if late else "nothing behind it is supervised"
