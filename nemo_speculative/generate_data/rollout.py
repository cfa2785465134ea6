"""One item of the data whose answers are generated: its questions, the answers so far, the rows they make."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_speculative.data.chat_template import Message, prompt_ids
from nemo_speculative.data.conversations import Conversation, Item, TokenRow
from nemo_speculative.utils.errors import UserError

T = TypeVar("T")
PROMPT_TAIL = 64
"""Tokens at a prompt's end that are enough to find a tag that opens the answer's reasoning there."""


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
    """Maximum lengths in tokens: of an answer, and of a prompt with its answer."""

    max_new_tokens: int
    max_length: int


class Reasoning:
    """Treatment of the reasoning at the start of an answer's text, between two ``tags``; the prompt may open it."""

    def __init__(self, tags: Sequence[str] = ("<think>", "</think>")):
        self.opening, self.closing = tags

    def apply(self, message: Message, prompt: str = "") -> Message:
        """The assistant's ``message`` as later turns see it; ``prompt``: the end of the text that it answers."""
        return message


class Keep(Reasoning):
    """Leaves the reasoning in the content."""


class Split(Reasoning):
    """Moves the reasoning to ``reasoning_content``; the chat template decides which turns see it."""

    def apply(self, message: Message, prompt: str = "") -> Message:
        text = message["content"] or ""
        # A tag in the middle of a text does not count: the answer starts with the reasoning, or the prompt opens it.
        opened = text.lstrip().startswith(self.opening) or prompt.rstrip().endswith(self.opening)
        if message.get("reasoning_content") or not opened:  # a server may have split it already
            return message
        # Without the closing tag, the reasoning was cut off.
        reasoning, _, rest = text.lstrip().removeprefix(self.opening).partition(self.closing)
        return {**message, "content": rest.lstrip(), "reasoning_content": reasoning.strip()}


class Drop(Split):
    """Removes the reasoning, so that no later turn sees it."""

    def apply(self, message: Message, prompt: str = "") -> Message:
        return {key: value for key, value in super().apply(message, prompt).items() if key != "reasoning_content"}


class Rollout:
    """The questions of ``item`` and the answers generated for them so far.

    A question is everything between two answers: messages of a user, a tool or the system, which stay as they are.  A
    row of token ids has one question, the ids before its first supervised token.

    Raises:
        Unanswerable: an answer has no question.
    """

    def __init__(self, item: Item, tokenizer: Any, reasoning: Reasoning):
        self.item, self.tokenizer, self.reasoning = item, tokenizer, reasoning
        self.questions = _questions(item)
        self.messages: list[Message] = []
        self.finish: list[str] = []
        """How each answer ended: stop, length, or context where there was no room for an answer."""
        self._rows: list[tuple[list[int], list[bool]]] = []

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
            messages, tools = [*self.messages, *self.questions[turn]], item.tools
            try:
                prompt = prompt_ids(self.tokenizer, messages, item.origin, tools)
            except UserError as error:
                raise Unanswerable(item.origin, str(error).removeprefix(f"{item.origin}: ")) from None
        room = limits.max_length - len(prompt)
        if room < 1:
            raise TooLong(item.origin, f"a question of {limits.max_length} tokens or more leaves no room")
        # The seed depends on the turn alone, so an answer is independent of the batch, the range and the run.  It has
        # 31 bits, which every server accepts.
        digest = hashlib.sha256(f"{seed}:{turn}:{item.id}".encode()).digest()
        turn_seed = int.from_bytes(digest[:4], "big") >> 1
        return Request(prompt, min(limits.max_new_tokens, room), turn_seed, messages, tools)

    def add(self, turn: int, request: Request, completion: Completion) -> None:
        """Adds the answer to ``request``; raises Unanswerable if it was cut before it had any content."""
        self.finish.append("stop" if completion.stopped else "length")
        if isinstance(self.item, Conversation):
            self.messages += [*self.questions[turn], self._message(request, completion)]
        if completion.ids is None:
            return
        ids, mask = self._rows.pop() if self._rows else ([], [])
        if request.prompt[: len(ids)] != ids:  # the template renders an earlier answer differently now: a new row
            self._rows.append((ids, mask))
            mask = []
        mask = mask + [False] * (len(request.prompt) - len(mask)) + [True] * len(completion.ids)
        self._rows.append((request.prompt + completion.ids, mask))

    def _message(self, request: Request, completion: Completion) -> Message:
        message = completion.message
        if message is None:
            # The text that a server's client gets and sends back with the next question.
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            message = {"role": "assistant", "content": text}
        stored = self.reasoning.apply(message, self.tokenizer.decode(request.prompt[-PROMPT_TAIL:]))
        has_content = any(stored.get(key) for key in ("content", "reasoning_content", "tool_calls"))
        if completion.ids is None and not has_content:
            raise Unanswerable(self.item.origin, "an answer was cut before it had any content")
        return stored

    def rows(self) -> list[TokenRow]:
        """The answered ids; several rows where a later prompt does not start with everything before it."""
        item, rows = self.item, self._rows
        names = [item.id] if len(rows) == 1 else [f"{item.id}#{n}" for n in range(len(rows))]
        return [TokenRow(name, *row, item.origin, item.source) for name, row in zip(names, rows, strict=True)]

    def record(self) -> dict[str, Any]:
        """The line of a data file, see :func:`nemo_speculative.data.conversations.parse_line`."""
        item = self.item
        rows = [{"input_ids": ids, "loss_mask": [int(m) for m in mask]} for ids, mask in self._rows]
        record: dict[str, Any] = {"id": item.id}
        if isinstance(item, Conversation):
            record |= {"conversations": self.messages}
            record |= {"tools": item.tools} if item.tools else {}
            record |= {"rows": rows} if rows else {}
        else:
            record |= rows[0]
        return record | ({"source": item.source} if item.source else {}) | {"finish": self.finish}


def _questions(item: Item) -> list[list[Message]]:
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
    if not all(any(m["role"] in ("user", "tool") for m in question) for question in questions):
        raise Unanswerable(
            item.origin, "the conversation asks nothing before one of its answers; expected a user's message there"
        )
    return questions


async def converse(
    rollout: Rollout, complete: Callable[[Request], Awaitable[Completion]], limits: Limits, seed: int = 0
) -> None:
    """Generates the answers turn by turn, until one has no room; raises Unanswerable if that is the first."""
    for turn in range(len(rollout.questions)):
        try:
            request = rollout.request(turn, limits, seed)
        except TooLong:
            if turn == 0:
                raise
            rollout.finish.append("context")
            return
        rollout.add(turn, request, await complete(request))


async def for_each(items: Iterable[T], handle: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Calls ``handle`` for ``items`` in order, up to ``concurrency`` at a time; reads each item when it is its turn.

    The first exception of a handler is raised, and the other handlers are canceled.
    """
    iterator = iter(items)

    async def work() -> None:
        for item in iterator:
            await handle(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
