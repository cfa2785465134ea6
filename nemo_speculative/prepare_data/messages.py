"""Chat messages of other spellings, as ``{"role", "content"}``."""

import json
from typing import Any

from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.prepare_data.tools import read_calls

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""What they are called elsewhere."""
CALLS = ("function_call", "tool_call")
"""Roles of messages whose content is the JSON of calls."""
REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: list[Any] | dict[str, list[Any]]) -> list[Message]:
    """The messages of a list of them, or of a dict of columns.

    Raises:
        LeftOut: one of them is none.
    """
    if isinstance(value, dict):
        value = [dict(zip(value, column, strict=False)) for column in zip(*value.values(), strict=False)]
    return _calls_joined([_message(message) for message in value])


def is_messages(value: Any) -> bool:
    """Whether ``value`` looks like messages."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and bool(_spelling(first))


def _spelling(message: Message) -> tuple[str, str] | None:
    return next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in message), None)


def _message(message: Any) -> Message:
    spelling = _spelling(message) if isinstance(message, dict) else None
    if spelling is None:
        raise LeftOut(reasons.UNKNOWN_ROLE, f"{message!r:.80}")
    said, content = message[spelling[0]], message.get(spelling[1])
    if said in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
    if not isinstance(said, str) or said.lower() not in ROLES:
        raise LeftOut(reasons.UNKNOWN_ROLE, f"{said!r:.80}")
    role = ROLES[said.lower()]
    return {"role": role, "content": _text(content, role)} | _extras(message, role)


def _extras(message: Message, role: str) -> Message:
    extras: Message = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if role == "assistant":
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        extras |= {"reasoning_content": _text(reasoning, role)} if reasoning else {}
        extras |= {"tool_calls": read_calls(message["tool_calls"])} if message.get("tool_calls") else {}
    return extras


def _text(content: Any, role: str) -> str:
    """The text of a string, of OpenAI's parts, or of a tool's result."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise LeftOut(reasons.NOT_TEXT, f"{content!r:.80}")


def _calls_joined(messages: list[Message]) -> list[Message]:
    """Calls that came as a message each are those of one answer."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else {}
        if before.get("role") == "assistant" and message.get("tool_calls") and not message["content"]:
            joined[-1] = before | {"tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
        else:
            joined.append(message)
    return joined
