"""One item of the data whose answers are generated: its questions, the answers so far, the rows they make."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.utils.errors import UserError

Message = dict[str, Any]
ASKING_ROLES = ("user", "tool")
CONTENT_KEYS = ("content", "reasoning_content", "tool_calls")
PROMPT_TAIL = 64
"""Tokens at a prompt's end that are enough to find a tag that opens the answer's reasoning there."""
SEED_BITS = 31
"""Every server accepts seeds of this size."""


class Unanswerable(UserError):
    """An item that no engine can answer; ``reason`` is the cause without the item's name."""

    def __init__(self, origin: str, reason: str):
        super().__init__(f"{origin}: {reason}")
        self.reason = reason


class TooLong(Unanswerable):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Request:
    """A prompt to be completed."""

    prompt: list[int]
    limit: int
    """Maximum length of the answer, in tokens."""
    seed: int
    messages: list[Message]
    """The messages that ``prompt`` renders; empty for a row of token ids."""
    tools: list[Message] | None = None


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt: an answer."""

    ids: list[int] | None
    """The ids as generated, including a stop token; None: the server returns text only."""
    stopped: bool
    """Whether it ended with a stop token, and not at its limit."""
    message: Message | None = None
    """The assistant's message, from servers that return no ids."""


@dataclass(frozen=True)
class Limits:
    """Maximum lengths in tokens."""

    max_new_tokens: int
    """Longest answer."""
    max_length: int
    """Longest prompt with its answer."""


Complete = Callable[[Request], Awaitable[Completion]]


class Reasoning(ABC):
    """Decides how later turns see the reasoning that an answer starts with; the answer's ids hold it in any case.

    Args:
        tags: the opening and the closing tag; the opening one may be the end of the prompt instead.
    """

    def __init__(self, tags: Sequence[str] = ("<think>", "</think>")):
        self.opening, self.closing = tags

    @abstractmethod
    def apply(self, message: Message, prompt: str = "") -> Message:
        """The assistant's ``message`` as the conversation stores it; ``prompt``: the end of the text it answers."""

    def split(self, text: str, prompt: str) -> tuple[str, str] | None:
        """Reasoning and the rest; None: there is no reasoning.  Reasoning that was cut off has no rest.

        A tag in the middle of a text does not count: the answer starts with the reasoning, or the prompt opens it.
        """
        if not text.lstrip().startswith(self.opening) and not prompt.rstrip().endswith(self.opening):
            return None
        before, _, rest = text.partition(self.closing)
        return before.strip().removeprefix(self.opening).strip(), rest.lstrip()


class Keep(Reasoning):
    """Leaves the reasoning in the content."""

    def apply(self, message: Message, prompt: str = "") -> Message:
        return message


class Split(Reasoning):
    """Moves the reasoning to ``reasoning_content``; the chat template decides which turns see it."""

    def apply(self, message: Message, prompt: str = "") -> Message:
        if message.get("reasoning_content"):  # the server has split it
            return message
        parts = self.split(message["content"] or "", prompt)
        return message if parts is None else {**message, "content": parts[1], "reasoning_content": parts[0]}


class Drop(Split):
    """Removes the reasoning, so that no later turn sees it."""

    def apply(self, message: Message, prompt: str = "") -> Message:
        return {key: value for key, value in super().apply(message, prompt).items() if key != "reasoning_content"}


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)

    def extend(self, prompt: list[int], answer: list[int]) -> None:
        """Appends a turn; ``prompt`` starts with the row's ids."""
        self.mask += [False] * (len(prompt) - len(self.mask)) + [True] * len(answer)
        self.ids = prompt + answer


class Rollout:
    """The questions of ``item`` and the answers generated for them so far.

    A question is everything between two answers: messages of a user, a tool or the system, which stay as they are.  A
    row of token ids has one question, the ids before its first supervised token.

    Raises:
        Unanswerable: an answer has no question.
    """

    def __init__(self, item: Conversation | TokenRow, tokenizer: Any, reasoning: Reasoning):
        self.item, self.tokenizer, self.reasoning = item, tokenizer, reasoning
        self.messages: list[Message] = []
        self.finish: list[str] = []
        """How each answer ended: stop, length, or context where there was no room for an answer."""
        self._rows: list[_Row] = []
        self._questions = _questions(item)

    @property
    def num_turns(self) -> int:
        return len(self._questions)

    def request(self, turn: int, limits: Limits, seed: int) -> Request:
        """The request for a turn's answer: the conversation so far, rendered as a server would.

        Raises:
            TooLong: it leaves no room for an answer.
            Unanswerable: the chat template rejects it.
        """
        item, messages, tools = self.item, [], None
        if isinstance(item, TokenRow):
            prompt = item.input_ids[: max(item.loss_mask.index(True), 1)]
        else:
            messages, tools = [*self.messages, *self._questions[turn]], item.tools
            try:
                prompt = prompt_ids(self.tokenizer, messages, item.origin, tools)
            except UserError as error:
                raise Unanswerable(item.origin, str(error).removeprefix(f"{item.origin}: ")) from None
        room = limits.max_length - len(prompt)
        if room < 1:
            raise TooLong(item.origin, f"a question of {limits.max_length} tokens or more leaves no room")
        # The seed depends on the turn alone, so an answer is independent of the batch, the range and the run.
        digest = hashlib.sha256(f"{seed}:{turn}:{item.id}".encode()).digest()
        turn_seed = int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
        return Request(prompt, min(limits.max_new_tokens, room), turn_seed, messages, tools)

    def add(self, turn: int, request: Request, completion: Completion) -> None:
        """Adds the answer to ``request``.

        Raises:
            Unanswerable: it was cut before it had any content.
        """
        self.finish.append("stop" if completion.stopped else "length")
        if isinstance(self.item, Conversation):
            self.messages += [*self._questions[turn], self._message(request, completion)]
        if completion.ids is not None:
            # A template may render earlier answers differently later on; then the turn is a row of its own.
            if not self._rows or request.prompt[: len(self._rows[-1].ids)] != self._rows[-1].ids:
                self._rows.append(_Row())
            self._rows[-1].extend(request.prompt, completion.ids)

    def _message(self, request: Request, completion: Completion) -> Message:
        message = completion.message
        if message is None:
            # The text that a server's client gets and sends back with the next question.
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            message = {"role": "assistant", "content": text}
        stored = self.reasoning.apply(message, self.tokenizer.decode(request.prompt[-PROMPT_TAIL:]))
        if completion.ids is None and not any(stored.get(key) for key in CONTENT_KEYS):
            raise Unanswerable(self.item.origin, "an answer was cut before it had any content")
        return stored

    def rows(self) -> list[TokenRow]:
        """The answered ids; several rows where a later prompt does not start with everything before it."""
        item = self.item
        ids = [item.id] if len(self._rows) == 1 else [f"{item.id}#{n}" for n in range(len(self._rows))]
        return [
            TokenRow(row_id, row.ids, row.mask, item.origin, item.source)
            for row_id, row in zip(ids, self._rows, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """The line of a data file, see :func:`nemo_speculative.data.conversations.parse_line`."""
        item = self.item
        rows = [{"input_ids": row.ids, "loss_mask": [int(m) for m in row.mask]} for row in self._rows]
        record: dict[str, Any] = {"id": item.id}
        if isinstance(item, Conversation):
            record |= {"conversations": self.messages}
            record |= {"tools": item.tools} if item.tools else {}
            record |= {"rows": rows} if rows else {}
        else:
            record |= rows[0]
        return record | ({"source": item.source} if item.source else {}) | {"finish": self.finish}


def _questions(item: Conversation | TokenRow) -> list[list[Message]]:
    if isinstance(item, TokenRow):
        return [[]] if any(item.loss_mask) else []
    questions: list[list[Message]] = [[]]
    for message in item.messages:
        if message["role"] == "assistant":
            questions.append([])
        else:
            questions[-1].append(message)
    if not questions[-1]:
        questions.pop()
    if not questions or not all(any(m["role"] in ASKING_ROLES for m in question) for question in questions):
        raise Unanswerable(
            item.origin, "the conversation asks nothing before one of its answers; expected a user's message there"
        )
    return questions


async def converse(rollout: Rollout, complete: Complete, limits: Limits, seed: int = 0) -> None:
    """Generates the answers turn by turn; a later question that leaves no room for an answer ends the conversation.

    Raises:
        Unanswerable: the first question leaves no room, or the chat template rejects a question.
    """
    for turn in range(rollout.num_turns):
        try:
            request = rollout.request(turn, limits, seed)
        except TooLong:
            if turn == 0:
                raise
            rollout.finish.append("context")
            return
        rollout.add(turn, request, await complete(request))
