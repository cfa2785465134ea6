"""A training's rendering of conversations compared with a chat server's, token by token.

For each answer a server receives the messages before it, and the model continues the prompt that it renders.  Training
agrees with it if the training's row starts with that prompt, the mask starts after it, and the answer is rendered as it
is at the end of a conversation: when the model wrote it, nothing followed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_speculative.data.chat_template import Message, normalize_messages, prompt_ids, render
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Client, Refused

WINDOW = 8
"""Tokens shown on each side of a difference."""
MAX_EXAMPLES = 5
"""Differences stored of each cause."""
TIMEOUT_SECONDS = 60.0
PROBE: list[Message] = [{"role": "user", "content": "Hello"}]


class ChatServer(Protocol):
    """A renderer of prompts."""

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        """The ids of the prompt for the answer to ``messages``.

        Raises:
            Refused: these messages cannot be rendered.
            UserError: no messages can be rendered.
        """


@dataclass(frozen=True)
class ByTemplate:
    """The tokenizer's own template, rendered as SGLang does (read in its source)."""

    tokenizer: Any

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None) -> list[int]:
        try:
            return prompt_ids(self.tokenizer, as_served(messages), "the template", tools)
        except UserError as error:
            raise Refused(str(error)) from None


class RunningServer:
    """An SGLang server's ``/tokenize`` route, which renders messages as for a chat completion.

    SGLang 0.5.23 returns the ids themselves (read in its ``serving_tokenize.py``); 0.5.9 accepts no messages there.
    A ``with`` block closes its connection.
    """

    def __init__(self, url: str, api_key: str | None = None):
        self._http = Client(url, api_key, timeout=TIMEOUT_SECONDS, name=f"url: {url.rstrip('/')}")

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.__exit__(*error)

    def check(self) -> None:
        """Renders a first message.

        Raises:
            UserError: the server cannot be reached, or cannot render messages.
        """
        try:
            self.prompt_ids(PROBE, None)
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
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        response = self._http.request("POST", "/tokenize", json=body)
        try:
            content: Any = response.json()
        except ValueError:
            content = None
        tokens = content.get("tokens") if isinstance(content, dict) else None
        if response.status == 200 and isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
            return tokens
        text = " ".join(response.data.decode(errors="replace").split())
        raise Refused(f"{self._http.url}/tokenize: HTTP {response.status}: {text:.200}")


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
    """The counts and examples of a comparison: ``equal + causes.total() = turns``.

    Args:
        max_length: of a training's rows, in tokens.
        limit: conversations to compare.
    """

    tokenizer: Any
    server: ChatServer
    max_length: int
    limit: int
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

    def add(self, item: Conversation | TokenRow, row: TokenRow | None) -> None:
        """
        Args:
            row: the row of the item, not truncated; None: a training makes none, and the rendering is compared anyway.

        Raises:
            UserError: the server does not answer.
        """
        if self.conversations + self.not_comparable >= self.limit:
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

        messages = item.messages[:turn]
        if not messages:
            return 0, difference(0, [], NO_QUESTION)
        try:
            served = self.server.prompt_ids(messages, item.tools)
        except Refused as error:
            return 0, difference(0, [], REFUSED, str(error))
        start, at = len(served), common_prefix(trained, served)
        if at < start:
            bare = rendered(self.tokenizer, item, as_served(messages))
            case = Mismatch(self.tokenizer, messages, bool(item.tools), trained, served, bare, at)
            return start, difference(at, served, find_cause(case))
        answered = rendered(self.tokenizer, item, item.messages[: turn + 1]) or []
        at = common_prefix(trained, answered)
        if at < len(answered):
            return start, difference(at, answered, ANSWER_CHANGES)
        if row is not None and (offset := mask_offset(row.loss_mask, start)):
            return start, difference(start, served, MASK, offset)
        return start, None


def rendered(tokenizer: Any, item: Conversation, messages: list[Message]) -> list[int] | None:
    """``messages`` of ``item`` without a generation prompt; None: the template rejects them."""
    try:
        return render(tokenizer, messages, item.origin, tools=item.tools)["input_ids"]
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


@dataclass(frozen=True)
class Mismatch:
    """A prompt that training and server render differently."""

    tokenizer: Any
    messages: list[Message]
    """The messages before the answer."""
    has_tools: bool
    trained: list[int]
    """The whole conversation as it is trained on."""
    served: list[int]
    """The prompt as the server renders it."""
    bare: list[int] | None
    """The tokenizer's own rendering without a generation prompt; None: the template rejects that."""
    position: int
    """Position of the first token that differs."""

    @property
    def texts(self) -> tuple[str, str]:
        """The texts around the difference, trained and served."""
        return self.tokenizer.decode(self.trained), self.tokenizer.decode(self.served)

    @property
    def openings(self) -> tuple[str, str]:
        """The text before the first question, trained and served; empty if the question cannot be found."""
        question = next((str(m["content"]).strip() for m in self.messages if m["role"] == "user"), "")
        trained, served = self.texts
        if not question or question not in trained or question not in served:
            return "", ""
        return trained.partition(question)[0], served.partition(question)[0]

    @property
    def thoughts(self) -> list[str]:
        return [thought for message in self.messages if (thought := thinking(message))]


def thinking(message: Message) -> str:
    """The reasoning of the assistant's ``message``."""
    within = str(message.get("content") or "").partition("</think>")
    return message.get("reasoning_content") or (within[0].removeprefix("<think>").strip() if within[1] else "")


def _doubled_start(case: Mismatch) -> bool:
    start = case.tokenizer.bos_token_id
    doubled = [ids[:2] == [start, start] for ids in (case.trained, case.served)]
    return start is not None and doubled[0] != doubled[1]


def _same_text(case: Mismatch) -> bool:
    trained, served = case.texts
    return trained.startswith(served)


def _generation_prompt(case: Mismatch) -> bool:
    return case.bare is not None and case.position >= len(case.bare) and case.served[: len(case.bare)] == case.bare


def _opening(case: Mismatch) -> bool:
    trained, served = case.openings
    return trained != served


def _thinking(case: Mismatch) -> bool:
    trained, served = case.texts
    return any((thought in trained) != (thought in served) for thought in case.thoughts)


CAUSES: dict[str, Callable[[Mismatch], bool]] = {
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
"""Conditions in order; the first that holds is the cause."""
NO_QUESTION = "the assistant writes first: no server renders a prompt for that"
REFUSED = "the server refuses the prompt"
ANSWER_CHANGES = "an answer is rendered otherwise once more turns follow, as templates do that drop earlier thinking"
MASK = "the mask does not begin where the model does"
UNKNOWN = "for another reason"


def find_cause(case: Mismatch) -> str:
    """The first of :data:`CAUSES` that holds."""
    return next((name for name, holds in CAUSES.items() if holds(case)), UNKNOWN)


def as_served(messages: list[Message]) -> list[Message]:
    """``messages`` as SGLang 0.5.23 passes them to the template: a last answer becomes a user's message."""
    normalized = normalize_messages(messages)
    if normalized and normalized[-1]["role"] == "assistant":
        normalized[-1] = {"role": "user", "content": normalized[-1]["content"]}
    return normalized
