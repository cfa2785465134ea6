"""The shapes in which datasets store conversations, recognized by their keys and converted to one form.

The form is :data:`Item`: chat messages in OpenAI's format (tool calls with arguments as objects, as chat templates read
them), or token ids with a mask.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.utils.errors import UserError, describe_error

Record = dict[str, Any]
Message = dict[str, Any]
Item = dict[str, Any]
"""``conversations`` and possibly ``tools``, or ``rows`` of ids as a target generated them; or ``input_ids`` and
``loss_mask``; or ``text``."""

CHAT = ("messages", "conversations", "conversation")
QUESTION = ("instruction", "question", "prompt", "query", "problem", "input")
ANSWER = ("output", "response", "completion", "solution", "answer")
"""A solution comes before the final answer that it derives."""
SYSTEM = ("system", "system_prompt")
MASK = ("loss_mask", "assistant_mask", "assistant_masks", "labels")
IGNORED_LABEL = -100

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Role names of other datasets."""
CALLS = ("function_call", "tool_call")
"""Roles of messages whose content is the JSON of tool calls."""
REASONING = ("reasoning_content", "reasoning", "thinking")


def recognize(record: Record) -> Item:
    """Converts ``record`` by the first of :data:`SHAPES` whose keys it has.

    Raises:
        LeftOut: it has the keys of none, or values that the shape does not allow.
    """
    shape = next((shape for shape in SHAPES if shape.matches(record)), None)
    if shape is None:
        raise LeftOut(reasons.UNKNOWN_SHAPE, f"the keys {', '.join(sorted(record)) or '(none)'}")
    return shape.read(record)


def known_shapes() -> str:
    """All shapes in one line."""
    return "; ".join(shape.description for shape in SHAPES)


# Conversations


def _read_chat(record: Record) -> Item:
    key = _chat_key(record)
    assert key is not None
    item = _conversation(record, read_messages(record[key]))
    # A line of recipes/generate_data.py keeps its ids: tokenizing the messages again could give others.
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "input_ids" in row for row in rows):
        return item  # "rows" of another meaning
    source = {"source": str(record["source"])} if record.get("source") else {}
    return item | {"rows": [_read_ids(row) for row in rows]} | source


def _read_pair(record: Record) -> Item:
    key = _first(record, QUESTION) or ""
    question, answer = record[key], _first(record, ANSWER)
    more = record.get("input") if key != "input" else None
    if more and is_messages(question):
        raise LeftOut(reasons.UNKNOWN_SHAPE, f"input in addition to a {key} of messages")
    if more:
        question = "\n\n".join(_message("user", text)["content"] for text in (question, more))
    history = [
        _message(role, text)
        for pair in record.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=False)
    ]
    messages = read_messages(question) if is_messages(question) else [*history, _message("user", question)]
    if answer:
        value = record[answer]
        messages += read_messages(value) if is_messages(value) else [_message("assistant", value)]
    return _conversation(record, messages)


def _read_query_with_calls(record: Record) -> Item:
    calls = {"role": "assistant", "content": "", "tool_calls": read_calls(record["answers"])}
    return _conversation(record, [_message("user", record["query"]), calls])


def _conversation(record: Record, messages: list[Message]) -> Item:
    """``messages`` with the system prompt and the tools that the record has in addition."""
    system = next((record[key] for key in SYSTEM if isinstance(record.get(key), str) and record[key].strip()), None)
    if system and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
    tools = read_tools(record.get("tools"))
    return {"conversations": messages} | ({"tools": tools} if tools else {})


def _message(role: str, text: Any) -> Message:
    if not isinstance(text, str):
        raise LeftOut(reasons.NOT_TEXT, f"{text!r:.80}")
    return {"role": role, "content": text}


def _first(record: Record, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _chat_key(record: Record) -> str | None:
    return next((key for key in CHAT if is_messages(record.get(key)) or record.get(key) == []), None)


# Messages


def read_messages(value: list[Any] | dict[str, list[Any]]) -> list[Message]:
    """Converts a list of messages, or a dict of columns, to ``{"role", "content"}``.

    Consecutive messages with tool calls become one assistant message.

    Raises:
        LeftOut: one of them is no message.
    """
    if isinstance(value, dict):
        value = [dict(zip(value, column, strict=False)) for column in zip(*value.values(), strict=False)]
    messages: list[Message] = []
    for message in map(_read_message, value):
        before = messages[-1] if messages else {}
        if before.get("role") == "assistant" and message.get("tool_calls") and not message["content"]:
            messages[-1] = before | {"tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
        else:
            messages.append(message)
    return messages


def is_messages(value: Any) -> bool:
    """Whether ``value`` looks like messages."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and _message_keys(first) is not None


def _message_keys(message: Message) -> tuple[str, str] | None:
    return next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in message), None)


def _read_message(message: Any) -> Message:
    keys = _message_keys(message) if isinstance(message, dict) else None
    if keys is None:
        raise LeftOut(reasons.UNKNOWN_ROLE, f"{message!r:.80}")
    name, content = message[keys[0]], message.get(keys[1])
    if name in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise LeftOut(reasons.UNKNOWN_ROLE, f"{name!r:.80}")
    role = ROLES[name.lower()]
    result: Message = {"role": role, "content": _text(content, role)}
    result |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if role == "assistant":
        if reasoning := next((message[key] for key in REASONING if message.get(key)), None):
            result["reasoning_content"] = _text(reasoning, role)
        if message.get("tool_calls"):
            result["tool_calls"] = read_calls(message["tool_calls"])
    return result


def _text(content: Any, role: str) -> str:
    """The text of a string, of a list of OpenAI's text parts, or of a tool's result."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise LeftOut(reasons.NOT_TEXT, f"{content!r:.80}")


# Tools


def read_tools(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {...}}]`` of a list of schemas, or of its JSON.

    Raises:
        LeftOut: it is neither.
    """
    tools = _from_json(value) if value else []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(_function(tool).get("name") for tool in tools):
        raise LeftOut(reasons.BAD_TOOLS, f"{value!r:.80}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def read_calls(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {"name", "arguments"}}]`` of one call or several, or of their JSON.

    Raises:
        LeftOut: it is no call.
    """
    calls = _from_json(value)
    return [_read_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _read_call(call: Any) -> dict[str, Any]:
    function = _function(call)
    arguments = _from_json(function.get("arguments", function.get("parameters", {})) or {})
    if not function.get("name") or not isinstance(arguments, dict):
        raise LeftOut(reasons.BAD_TOOLS, f"{call!r:.80}")
    identity = {"id": call["id"]} if call.get("id") else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function(value: Any) -> dict[str, Any]:
    inner = value.get("function", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        raise LeftOut(reasons.BAD_TOOLS, f"{value!r:.80}") from None


# Token ids


def _read_ids(record: Record) -> Item:
    key = _first(record, MASK) or MASK[0]
    ids, mask = record["input_ids"], record.get(key)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise LeftOut(reasons.BAD_IDS, f"input_ids {ids!r:.60}")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(isinstance(m, int | bool) for m in mask):
        raise LeftOut(reasons.BAD_IDS, f"{key} {mask!r:.60} for {len(ids)} ids")
    supervised = [m != IGNORED_LABEL for m in mask] if key == "labels" else mask
    if not all(m in (0, 1) for m in supervised):
        raise LeftOut(reasons.BAD_IDS, f"{key} holds other than 0 and 1")
    return {"input_ids": ids, "loss_mask": [int(m) for m in supervised]}


@dataclass(frozen=True)
class FormattedText:
    """Tokenizes text that a chat template has formatted, and finds the answers by the marks around one."""

    tokenizer: Any
    start: str
    """The text that the template prints before an answer."""
    end: str
    """The text that the template prints after an answer."""

    @classmethod
    def from_tokenizer(cls, path: str) -> "FormattedText":
        """The shape of text that the chat template of the tokenizer at ``path`` formatted.

        Raises:
            UserError: it cannot be loaded, or its template does not mark answers.
        """
        from transformers import AutoTokenizer  # slow to import, and rarely needed

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # one class for each way in which a hub can fail
            raise UserError(
                f"tokenizer: {path} cannot be loaded here ({describe_error(error, 100)}); give a directory"
            ) from None
        chat_template_of(tokenizer)
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
        question = tokenizer.apply_chat_template(messages[:1], tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages, tokenize=False)
        start, end = prompt.removeprefix(question).strip(), answered.rpartition("an answer")[2].strip()
        if not prompt.startswith(question) or not start or not end:
            raise UserError(f"tokenizer: the chat template of {path} does not mark answers; give input_ids")
        return cls(tokenizer, start, end)

    @property
    def identity(self) -> str:
        """Hash of everything that shapes the rows."""
        content = self.tokenizer.backend_tokenizer.to_str() + self.tokenizer.chat_template
        return hashlib.sha256(content.encode()).hexdigest()

    def read(self, text: str) -> Item:
        """``input_ids`` and ``loss_mask`` of ``text``; an answer includes the mark that ends it.

        Raises:
            LeftOut: it has no answer.
        """
        spans = self._answer_spans(text)
        if not spans:
            raise LeftOut(reasons.NO_SPAN, f"no {self.start!r} in {text!r:.60}")
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(first <= start < last for first, last in spans) for start, _ in tokens["offset_mapping"]]
        return {"input_ids": tokens["input_ids"], "loss_mask": [int(i) for i in inside]}

    def _answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters, of each answer."""
        spans, at = [], text.find(self.start)
        while at >= 0:
            start = at + len(self.start)
            start += len(text[start:]) - len(text[start:].lstrip("\n"))
            end = text.find(self.end, start)
            end = len(text) if end < 0 else end + len(self.end)
            spans.append((start, end))
            at = text.find(self.start, end)
        return spans


@dataclass(frozen=True)
class Shape:
    """A shape of records."""

    description: str
    """The keys, for error messages."""
    matches: Callable[[Record], bool]
    read: Callable[[Record], Item]
    """Converts a record; raises LeftOut for values that the keys do not allow."""


SHAPES = (
    Shape(
        f"input_ids with {' or '.join(MASK)}",
        lambda record: "input_ids" in record and _first(record, MASK) is not None,
        _read_ids,
    ),
    Shape(
        f"{' or '.join(CHAT)} (a list of role/content or from/value)",
        lambda record: _chat_key(record) is not None,
        _read_chat,
    ),
    Shape(
        "query, tools and answers (calls)",
        lambda record: all(isinstance(record.get(key), str | list) for key in ("query", "tools", "answers")),
        _read_query_with_calls,
    ),
    Shape(
        f"one of {', '.join(QUESTION)} with one of {', '.join(ANSWER)}",
        lambda record: (
            _first(record, QUESTION) not in (None, _first(record, ANSWER)) and _first(record, ANSWER) is not None
        ),
        _read_pair,
    ),
    Shape(
        "text (formatted; needs tokenizer=)",
        lambda record: isinstance(record.get("text"), str),
        lambda record: {"text": record["text"]},
    ),
    Shape(
        "prompt, question or instruction (no answer)", lambda record: _first(record, QUESTION) is not None, _read_pair
    ),
)
"""The most informative first: rows often hold their conversation in several shapes."""
