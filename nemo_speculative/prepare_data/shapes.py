"""The shapes in which datasets store conversations, recognized by their keys and converted to one form.

The form is :data:`Item`: chat messages in OpenAI's format (tool calls with arguments as objects, as chat templates read
them), or token ids with a mask.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.prepare_data.readers import UNKNOWN_SHAPE, LeftOut
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
MASK = ("loss_mask", "assistant_mask", "assistant_masks", "labels")
KNOWN_SHAPES = "; ".join((
    f"input_ids with {' or '.join(MASK)}",
    f"{' or '.join(CHAT)} (a list of role/content or from/value)",
    "query, tools and answers (calls)",
    f"one of {', '.join(QUESTION)} with one of {', '.join(ANSWER)}",
    "text (formatted; needs tokenizer=)",
    "prompt, question or instruction (no answer)",
))  # fmt: skip
"""The keys of all shapes, for error messages."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Role names of other datasets."""


def recognize(record: Record) -> Item:
    """Converts ``record`` by the first shape whose keys it has: rows often hold their conversation in several.

    Raises LeftOut if it has the keys of none, or values that the shape does not allow.
    """
    question, answer = _first(record, QUESTION), _first(record, ANSWER)
    if "input_ids" in record and _first(record, MASK):
        return _read_ids(record)
    if chat := next((key for key in CHAT if is_messages(record.get(key)) or record.get(key) == []), None):
        return _read_chat(record, chat)
    if all(isinstance(record.get(key), str | list) for key in ("query", "tools", "answers")):
        calls = {"role": "assistant", "content": "", "tool_calls": read_calls(record["answers"])}
        return _conversation(record, [_message("user", record["query"]), calls])
    if question and answer:
        return _read_pair(record, question, answer)
    if isinstance(record.get("text"), str):
        return {"text": record["text"]}
    if question:
        return _read_pair(record, question, None)
    raise LeftOut(UNKNOWN_SHAPE, f"the keys {', '.join(sorted(record)) or '(none)'}")


def _first(record: Record, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


# Conversations


def _read_chat(record: Record, key: str) -> Item:
    item = _conversation(record, read_messages(record[key]))
    # A line of recipes/generate_data.py keeps its ids: tokenizing the messages again could give others.
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "input_ids" in row for row in rows):
        return item  # "rows" of another meaning
    source = {"source": str(record["source"])} if record.get("source") else {}
    return item | {"rows": [_read_ids(row) for row in rows]} | source


def _read_pair(record: Record, question: str, answer: str | None) -> Item:
    asked, more = record[question], record.get("input") if question != "input" else None
    if is_messages(asked):
        if more:
            raise LeftOut(UNKNOWN_SHAPE, f"input in addition to a {question} of messages")
        messages = read_messages(asked)
    else:
        messages = [
            _message(role, text)
            for pair in record.get("history") or []
            for role, text in zip(("user", "assistant"), pair, strict=False)
        ]
        if more:
            asked = "\n\n".join(_message("user", text)["content"] for text in (asked, more))
        messages.append(_message("user", asked))
    if answer:
        value = record[answer]
        messages += read_messages(value) if is_messages(value) else [_message("assistant", value)]
    return _conversation(record, messages)


def _conversation(record: Record, messages: list[Message]) -> Item:
    """``messages`` with the system prompt and the tools that the record has in addition."""
    prompts = [record.get(key) for key in ("system", "system_prompt")]
    system = next((text for text in prompts if isinstance(text, str) and text.strip()), None)
    if system and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
    tools = read_tools(record.get("tools"))
    return {"conversations": messages} | ({"tools": tools} if tools else {})


def _message(role: str, text: Any) -> Message:
    if not isinstance(text, str):
        raise LeftOut("content is not text", f"{text!r:.80}")
    return {"role": role, "content": text}


# Messages


def read_messages(value: list[Any] | dict[str, list[Any]]) -> list[Message]:
    """Converts a list of messages, or a dict of columns, to ``{"role", "content"}``.

    Consecutive messages with tool calls become one assistant message.  Raises LeftOut if one of them is no message.
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
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _read_message(message: Any) -> Message:
    if not isinstance(message, dict) or not is_messages(message):
        raise LeftOut("unknown role", f"{message!r:.80}")
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    name, content = message[role_key], message.get(content_key)
    if name in ("function_call", "tool_call"):  # the content is the JSON of calls
        return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise LeftOut("unknown role", f"{name!r:.80}")
    role = ROLES[name.lower()]
    result: Message = {"role": role, "content": _text(content, role)}
    result |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if role == "assistant":
        keys = ("reasoning_content", "reasoning", "thinking")
        if reasoning := next((message[key] for key in keys if message.get(key)), None):
            result["reasoning_content"] = _text(reasoning, role)
        if message.get("tool_calls"):
            result["tool_calls"] = read_calls(message["tool_calls"])
    return result


def _text(content: Any, role: str) -> str:
    """The text of a string, of a list of OpenAI's text parts, or of a tool's result."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise LeftOut("content is not text", f"{content!r:.80}")


# Tools


def read_tools(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {...}}]`` of a list of schemas, or of its JSON; raises LeftOut if neither."""
    tools = _from_json(value) if value else []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(_function(tool).get("name") for tool in tools):
        raise _bad_tools(value)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def read_calls(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {"name", "arguments"}}]`` of one call or several, or of their JSON.

    Raises LeftOut if one is no call.
    """
    calls, result = _from_json(value), []
    for call in calls if isinstance(calls, list) else [calls]:
        function = _function(call)
        arguments = _from_json(function.get("arguments", function.get("parameters", {})) or {})
        if not function.get("name") or not isinstance(arguments, dict):
            raise _bad_tools(call)
        identity = {"id": call["id"]} if call.get("id") else {}
        result.append(identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _function(value: Any) -> dict[str, Any]:
    inner = value.get("function", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError):
        raise _bad_tools(value) from None


def _bad_tools(value: Any) -> LeftOut:
    return LeftOut("tools or tool calls cannot be read", f"{value!r:.80}")


# Token ids


def _read_ids(record: Record) -> Item:
    key = _first(record, MASK) or MASK[0]
    ids, mask = record["input_ids"], record.get(key)
    reason = "token ids or mask cannot be read"
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise LeftOut(reason, f"input_ids {ids!r:.60}")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(isinstance(m, int) for m in mask):
        raise LeftOut(reason, f"{key} {mask!r:.60} for {len(ids)} ids")
    if key != "labels" and not all(m in (0, 1) for m in mask):
        raise LeftOut(reason, f"{key} holds other than 0 and 1")
    # -100 marks a label that is not trained on.
    return {"input_ids": ids, "loss_mask": [int(m != -100 if key == "labels" else m) for m in mask]}


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
        """The shape of text that the tokenizer at ``path`` formatted; raises UserError if it does not mark answers."""
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
        """``input_ids`` and ``loss_mask`` of ``text``, answers with their end marks; raises LeftOut if it has none."""
        answer = rf"{re.escape(self.start)}\n*(.*?(?:{re.escape(self.end)}|\Z))"
        spans = [match.span(1) for match in re.finditer(answer, text, re.DOTALL)]
        if not spans:
            raise LeftOut("no answer found in the formatted text", f"no {self.start!r} in {text!r:.60}")
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(first <= start < last for first, last in spans) for start, _ in tokens["offset_mapping"]]
        return {"input_ids": tokens["input_ids"], "loss_mask": [int(i) for i in inside]}
