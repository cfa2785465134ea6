"""A training's rendering of conversations compared with a chat server's, token by token.

For each answer a server receives the messages before it, and the model continues the prompt that it renders.  Training
agrees with it if the training's row starts with that prompt, the mask starts after it, and the answer is rendered as it
is at the end of a conversation: when the model wrote it, nothing followed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_speculative.data.chat_template import Message, normalize_messages, prompt_ids, render
from nemo_speculative.data.conversations import Conversation, Item, TokenRow
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Client, Refused

WINDOW = 8
"""Tokens shown on each side of a difference."""
MAX_EXAMPLES = 5
"""Differences stored of each cause."""


@dataclass(frozen=True)
class ByTemplate:
    """The tokenizer's own template, rendered as SGLang does (read in its source)."""

    tokenizer: Any

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids of the prompt for the answer to ``messages``; raises Refused if they cannot be rendered."""
        try:
            return prompt_ids(self.tokenizer, as_served(messages), "the template", tools)
        except UserError as error:
            raise Refused(str(error)) from None


class RunningServer(Client):
    """An SGLang server's ``/tokenize`` route, which renders messages as for a chat completion.

    SGLang 0.5.23 returns the ids themselves (read in its ``serving_tokenize.py``); 0.5.9 accepts no messages there.
    """

    def __init__(self, url: str, api_key: str | None = None):
        super().__init__(url, api_key, timeout=60.0, name=f"url: {url.rstrip('/')}")

    def __enter__(self) -> "RunningServer":
        return self

    def check(self) -> None:
        """Renders a first message; raises UserError if the server cannot be reached, or cannot render messages."""
        try:
            self.prompt_ids([{"role": "user", "content": "Hello"}], None)
        except Refused as error:
            raise UserError(
                f"url: {error}; expected an SGLang server that renders messages over /tokenize, as 0.5.23 does"
            ) from None

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids of the prompt for the answer to ``messages``.

        Raises:
            Refused: the server cannot render these messages.
            Unreachable, Unauthorized: no request will succeed.
        """
        response = self.request("POST", "/tokenize", json={"messages": messages} | ({"tools": tools} if tools else {}))
        try:
            tokens = response.json()["tokens"]
        except (ValueError, TypeError, KeyError):
            tokens = None
        if response.status == 200 and isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
            return tokens
        text = " ".join(response.data.decode(errors="replace").split())
        raise Refused(f"{self.url}/tokenize: HTTP {response.status}: {text:.200}")


@dataclass(frozen=True)
class Difference:
    """The first difference in a turn."""

    id: str
    message: int
    """The index of the answer among the conversation's messages, from 0."""
    position: int
    """Number of tokens before the difference."""
    cause: str
    before: list[str]
    """The tokens before the difference, at most eight."""
    trained: list[str]
    served: list[str]
    """The tokens from there on, at most eight each."""
    note: str = ""


@dataclass
class Comparison:
    """The counts and examples of a comparison: ``equal + causes.total() = turns``."""

    tokenizer: Any
    server: ByTemplate | RunningServer
    max_length: int
    """Length of a training's rows, in tokens."""
    limit: int
    """Conversations to compare."""
    conversations: int = 0
    not_comparable: int = 0
    """Rows of token ids, which have no messages, and conversations that the template rejects."""
    turns: int = 0
    equal: int = 0
    cut_off: int = 0
    """Turns whose answer starts after ``max_length``: never trained, and not counted in ``turns``."""
    causes: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    """The first ones of each cause."""

    def add(self, item: Item, row: TokenRow | None) -> None:
        """Compares ``item``; ``row``: its row before truncation, or None if a training makes none of it."""
        if self.conversations + self.not_comparable >= self.limit:
            return
        trained = None
        if isinstance(item, Conversation):
            trained = row.input_ids if row else self._rendered(item, item.messages)
        if trained is None or not isinstance(item, Conversation):
            self.not_comparable += 1
            return
        self.conversations += 1
        for turn in (n for n, message in enumerate(item.messages) if message["role"] == "assistant"):
            start, difference = self._compare(item, turn, trained, row)
            if start >= self.max_length:
                self.cut_off += 1
                continue
            self.turns += 1
            if difference is None:
                self.equal += 1
                continue
            self.causes[difference.cause] += 1
            if self.causes[difference.cause] <= MAX_EXAMPLES:
                self.differences.append(difference)

    def _compare(
        self, item: Conversation, turn: int, trained: list[int], row: TokenRow | None
    ) -> tuple[int, Difference | None]:
        """The start of the answer, as served, and the turn's first difference."""

        def difference(at: int, served: list[int], cause: str, note: str = "") -> Difference:
            windows = (trained[max(at - WINDOW, 0) : at], trained[at : at + WINDOW], served[at : at + WINDOW])
            before, on_training, on_server = ([self.tokenizer.decode([i]) for i in ids] for ids in windows)
            return Difference(item.id, turn, at, cause, before, on_training, on_server, note)

        if turn == 0:
            return 0, difference(0, [], "the assistant writes first: no server renders a prompt for that")
        try:
            served = self.server.prompt_ids(item.messages[:turn], item.tools)
        except Refused as error:
            return 0, difference(0, [], "the server refuses the prompt", str(error))
        start, at = len(served), common_prefix(trained, served)
        if at < start:
            return start, difference(at, served, self._cause(item, turn, trained, served, at))
        answered = self._rendered(item, item.messages[: turn + 1]) or []
        at = common_prefix(trained, answered)
        if at < len(answered):
            cause = "an answer is rendered otherwise once more turns follow, as templates do that drop earlier thinking"
            return start, difference(at, answered, cause)
        if row is not None and (offset := mask_offset(row.loss_mask, start)):
            return start, difference(start, served, "the mask does not begin where the model does", offset)
        return start, None

    def _cause(self, item: Conversation, turn: int, trained: list[int], served: list[int], at: int) -> str:
        """The likely cause of a prompt that training and server render differently from token ``at`` on."""
        messages, start = item.messages[:turn], self.tokenizer.bos_token_id
        text, served_text = self.tokenizer.decode(trained), self.tokenizer.decode(served)
        if messages[-1]["role"] == "assistant":
            return "two answers in a row: a server takes the first for the user's"
        if start is not None and (trained[:2] == [start, start]) != (served[:2] == [start, start]):
            return "the start token is doubled"
        if text.startswith(served_text):
            return "the same text in other tokens"
        bare = self._rendered(item, as_served(messages))  # without a generation prompt
        if bare is not None and at >= len(bare) and served[: len(bare)] == bare:
            return "the generation prompt is not how the answer begins"
        question = next((str(m["content"]).strip() for m in messages if m["role"] == "user"), "")
        known = question and question in text and question in served_text
        if known and text.partition(question)[0] != served_text.partition(question)[0]:
            if item.tools:
                return "tools are written otherwise"
            return "something else before the first question, as a default system prompt or a date"
        if any((thought in text) != (thought in served_text) for thought in map(thinking, messages)):
            return "the thinking of earlier turns is on one side only"
        return "for another reason"

    def _rendered(self, item: Conversation, messages: list[Message]) -> list[int] | None:
        """``messages`` of ``item`` without a generation prompt; None: the template rejects them."""
        try:
            return render(self.tokenizer, messages, item.origin, tools=item.tools)["input_ids"]
        except UserError:
            return None


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both start with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def mask_offset(mask: Sequence[bool], start: int) -> str:
    """The distance from ``start`` to the first supervised token, in words; empty if it is zero."""
    if start < len(mask) and mask[start]:
        early = next((n for n in range(start) if not mask[start - 1 - n]), start)
        return f"earlier by {early}" if early else ""
    late = next((n for n in range(1, len(mask) - start) if mask[start + n]), None)
    return f"later by {late}" if late else "nothing after it is supervised"


def thinking(message: Message) -> str:
    """The reasoning of the assistant's ``message``; empty if there is none."""
    before, tag, _ = str(message.get("content") or "").partition("</think>")
    return message.get("reasoning_content") or (before.removeprefix("<think>").strip() if tag else "")


def as_served(messages: list[Message]) -> list[Message]:
    """``messages`` as SGLang 0.5.23 passes them to the template: a last answer becomes a user's message."""
    normalized = normalize_messages(messages)
    if normalized and normalized[-1]["role"] == "assistant":
        normalized[-1] = {"role": "user", "content": normalized[-1]["content"]}
    return normalized
