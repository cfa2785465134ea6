"""One item of the data, whose answers are given anew: its questions, and the answers so far."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.data.conversation import Conversation, TokenRow
from nemo_speculative.generate_data.reasoning import Reasoning
from nemo_speculative.utils.errors import UserError

Message = dict[str, Any]
ASKING = ("user", "tool")
SAYING = ("content", "reasoning_content", "tool_calls")
PROMPT_END = 64
"""Tokens of a prompt that hold the tag which opens its answer's reasoning, if it ends with one."""
SEED_BITS = 31
"""What every server takes."""


class Unanswerable(UserError):
    """Nobody can answer this item; ``reason`` says why without naming it."""

    def __init__(self, origin: str, reason: str):
        super().__init__(f"{origin}: {reason}")
        self.reason = reason


class TooLong(Unanswerable):
    """A question leaves no room for an answer."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt: list[int]
    limit: int
    """Longest answer, in tokens."""
    seed: int
    messages: list[Message]
    """What ``prompt`` renders; empty where ids are all that is known."""
    tools: list[Message] | None = None


@dataclass(frozen=True)
class Completion:
    """An answer."""

    ids: list[int] | None
    """As generated, its stop token included; None: who answered does not tell."""
    stopped: bool
    """Whether it ended by itself, and not at its limit."""
    message: Message | None = None
    """What was said, by those who do not tell the ids."""


@dataclass(frozen=True)
class Limits:
    """How long things may get, in tokens."""

    max_new_tokens: int
    """Of an answer."""
    max_length: int
    """Of a prompt and its answer."""


Complete = Callable[[Request], Awaitable[Completion]]


@dataclass
class _Row:
    ids: list[int]
    mask: list[bool] = field(default_factory=list)

    def extend(self, prompt: list[int], answer: list[int]) -> None:
        """``prompt`` begins with what is there."""
        self.mask += [False] * (len(prompt) - len(self.mask)) + [True] * len(answer)
        self.ids = prompt + answer


class Rollout:
    """The questions of ``item``, and the answers given to them so far.

    A question is what lies between two answers: the messages of a user, a tool or the system, which are kept.  A row of
    token ids asks one, up to its first supervised token.

    Raises:
        Unanswerable: an answer has no question.
    """

    def __init__(self, item: Conversation | TokenRow, tokenizer: Any, reasoning: Reasoning):
        self.item, self.tokenizer, self.reasoning = item, tokenizer, reasoning
        self.messages: list[Message] = []
        self.finish: list[str] = []
        """For each question how its answer ended: stop, length; or context, where there was no room for one."""
        self._rows: list[_Row] = []
        self._questions = _questions(item)

    @property
    def num_turns(self) -> int:
        return len(self._questions)

    def prompt(self, turn: int) -> list[int]:
        """The ids that are answered: as a server renders the conversation until then, the new answers in it.

        Raises:
            Unanswerable: the chat template rejects it.
        """
        if isinstance(self.item, TokenRow):
            return self.item.input_ids[: max(self.item.loss_mask.index(True), 1)]
        asked = [*self.messages, *self._questions[turn]]
        try:
            return prompt_ids(self.tokenizer, asked, self.item.origin, self.item.tools)
        except UserError as error:
            raise Unanswerable(self.item.origin, str(error).removeprefix(f"{self.item.origin}: ")) from None

    def request(self, turn: int, limits: Limits, seed: int) -> Request:
        """The question of a turn.

        Raises:
            TooLong: it leaves no room for an answer.
            Unanswerable: the chat template rejects it.
        """
        prompt = self.prompt(turn)
        room = limits.max_length - len(prompt)
        if room < 1:
            raise TooLong(self.item.origin, f"a question of {limits.max_length} tokens or more leaves no room")
        messages = [*self.messages, *self._questions[turn]] if isinstance(self.item, Conversation) else []
        tools = self.item.tools if isinstance(self.item, Conversation) else None
        return Request(prompt, min(limits.max_new_tokens, room), _seed(seed, self.item.id, turn), messages, tools)

    def add(self, turn: int, request: Request, completion: Completion) -> None:
        """Takes over the answer to ``request``.

        Raises:
            Unanswerable: it was cut before it said anything.
        """
        self.finish.append("stop" if completion.stopped else "length")
        if isinstance(self.item, Conversation):
            self.messages += [*self._questions[turn], self._said(request, completion)]
        if completion.ids is not None:
            self._add_row(request.prompt, completion.ids)

    def _said(self, request: Request, completion: Completion) -> Message:
        message = completion.message
        if message is None:
            # What a client of a server reads, and sends back with the next question.
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            message = {"role": "assistant", "content": text}
        kept = self.reasoning.applied(message, self.tokenizer.decode(request.prompt[-PROMPT_END:]))
        if completion.ids is None and not any(kept.get(key) for key in SAYING):
            raise Unanswerable(self.item.origin, "an answer was cut before it said anything")
        return kept

    def _add_row(self, prompt: list[int], answer: list[int]) -> None:
        last = self._rows[-1] if self._rows else None
        # A template may render earlier answers differently later on; then the turn is a row of its own.
        if last is None or prompt[: len(last.ids)] != last.ids:
            self._rows.append(last := _Row([]))
        last.extend(prompt, answer)

    @property
    def exact(self) -> bool:
        """Whether the ids of every answer are known."""
        return bool(self._rows)

    def rows(self) -> list[TokenRow]:
        """The answered ids; several rows where a later prompt does not begin with all before it."""
        item = self.item
        names = [item.id] if len(self._rows) == 1 else [f"{item.id}#{n}" for n in range(len(self._rows))]
        return [
            TokenRow(name, row.ids, row.mask, item.origin, item.source)
            for name, row in zip(names, self._rows, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """The line of a data file, see :func:`nemo_speculative.data.conversation.parse_line`."""
        item = self.item
        rows = [{"input_ids": row.ids, "loss_mask": [int(m) for m in row.mask]} for row in self._rows]
        said: dict[str, Any] = {"id": item.id}
        if isinstance(item, Conversation):
            said |= {"conversations": self.messages}
            said |= {"tools": item.tools} if item.tools else {}
            said |= {"rows": rows} if rows else {}
        else:
            said |= rows[0]
        return said | ({"source": item.source} if item.source else {}) | {"finish": self.finish}


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
    if not questions or not all(any(m["role"] in ASKING for m in asked) for asked in questions):
        raise Unanswerable(
            item.origin, "the conversation asks nothing before one of its answers; expected a user's message there"
        )
    return questions


def _seed(seed: int, identity: str, turn: int) -> int:
    """Of the turn alone: an answer does not depend on what is answered beside it, nor on the range or the run."""
    digest = hashlib.sha256(f"{seed}:{turn}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


async def converse(dialogue: Rollout, complete: Complete, limits: Limits, seed: int = 0) -> None:
    """Answers turn after turn; one that leaves no room for an answer ends the conversation there.

    Raises:
        Unanswerable: the first question leaves no room, or a question is rejected by the chat template.
    """
    for turn in range(dialogue.num_turns):
        try:
            request = dialogue.request(turn, limits, seed)
        except TooLong:
            if turn == 0:
                raise
            dialogue.finish.append("context")
            return
        dialogue.add(turn, request, await complete(request))
