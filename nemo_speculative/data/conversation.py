"""Conversations and token rows, and the lines of a data file parsed into them."""

import json
from dataclasses import dataclass, replace
from typing import Any

from nemo_speculative.utils.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A list of chat messages ``{"role", "content"}``, possibly with ``reasoning_content`` and ``tool_calls``."""

    id: str
    messages: list[dict[str, Any]]
    origin: str
    """``file:line`` that it was read from, for error messages."""
    tools: list[dict[str, Any]] | None = None
    """Tools that the assistant may call, as the chat template takes them."""
    source: str = ""
    """Its dataset within a mix."""

    @property
    def has_answer(self) -> bool:
        return any(m["role"] == "assistant" for m in self.messages)


@dataclass(frozen=True)
class TokenRow:
    """A conversation as token ids, with the assistant's tokens marked."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]
    """True for tokens that the assistant wrote."""
    origin: str
    source: str = ""

    def cut(self, max_length: int) -> "TokenRow":
        """The first ``max_length`` tokens; the row itself if it has no more."""
        if len(self.input_ids) <= max_length:
            return self
        return replace(self, input_ids=self.input_ids[:max_length], loss_mask=self.loss_mask[:max_length])


def parse_line(line: bytes, origin: str, number: str) -> list[Conversation | TokenRow]:
    """Parses a line of a data file: a conversation, a token row, or the several token rows of a generated conversation.

    Args:
        origin: ``file:line``, for error messages.
        number: the id of a line that has none.

    Raises:
        UserError: the line is malformed.
    """
    record = parse_json(line, origin)
    identity = number if record.get("id") is None else str(record["id"])
    source = str(record.get("source") or "")
    if "rows" in record:  # as generated: tokenizing the text again could give other ids
        return _generated_rows(record["rows"], identity, origin, source)
    if "conversations" in record:
        messages = check_messages(record["conversations"], origin)
        return [Conversation(identity, messages, origin, _tools(record.get("tools"), origin), source)]
    if "input_ids" in record:
        return [_token_row(record, identity, origin, source)]
    raise UserError(
        f'{origin}: found the keys {sorted(record)}, expected "conversations", or "input_ids" and "loss_mask"; '
        "recipes/prepare_data.py reads other shapes"
    )


def parse_json(line: bytes, origin: str) -> dict[str, Any]:
    """Parses a line as a JSON object.

    Raises:
        UserError: it is not one.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not JSON ({error.msg}, column {error.colno}); expected one object a line; "
            "recipes/prepare_data.py reads other shapes"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{origin}: found a {type(record).__name__}, expected a JSON object")
    return record


def check_messages(value: Any, origin: str, key: str = "conversations") -> list[dict[str, Any]]:
    """Returns ``value`` unchanged.

    Raises:
        UserError: it is not a list of chat messages in a valid order; names ``origin``.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f'{origin}: "{key}" must be a list of messages, not {value!r:.60}')
    for index, message in enumerate(value):
        _check_message(message, index, origin)
        if problem := _order_problem(message, index, value[index - 1] if index else None):
            raise UserError(
                f"{origin}: message {index} {problem}; correct it "
                "(recipes/prepare_data.py leaves such rows out, counted)"
            )
    return value


def _order_problem(message: dict[str, Any], index: int, before: dict[str, Any] | None) -> str | None:
    """Why no chat has this message after ``before``, though a template may render it; None if one may."""
    role = message["role"]
    if role == "system" and index:
        return "is the system's, expected first"
    if role == "assistant" and before and before["role"] == "assistant":
        return "is a second answer in a row, expected the user's or a tool's before it"
    content = message.get("content") or message.get("reasoning_content") or message.get("tool_calls")
    if role in ("user", "assistant") and not (content.strip() if isinstance(content, str) else content):
        return f"of the {role} is empty, expected text"
    return None


def _check_message(message: Any, index: int, origin: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"{origin}: message {index} is {message!r:.60}, expected a role among {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str) and not (
        message.get("content") is None and message["role"] == "assistant" and message.get("tool_calls")
    ):
        raise UserError(f"{origin}: message {index} has the content {message.get('content')!r:.60}, expected text")
    if not isinstance(message.get("reasoning_content", ""), str | None):
        raise UserError(f'{origin}: message {index}: "reasoning_content" must be text')
    if not isinstance(message.get("tool_calls") or [], list):
        raise UserError(f'{origin}: message {index}: "tool_calls" must be a list')


def _tools(value: Any, origin: str) -> list[dict[str, Any]] | None:
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise UserError(f'{origin}: "tools" must be a list of JSON objects, not {value!r:.60}')
    return value or None


def _generated_rows(rows: Any, identity: str, origin: str, source: str) -> list[Conversation | TokenRow]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "input_ids" in row for row in rows):
        raise UserError(f'{origin}: "rows" must be a list of {{"input_ids", "loss_mask"}}, not {rows!r:.60}')
    names = [identity] if len(rows) == 1 else [f"{identity}#{turn}" for turn in range(len(rows))]
    return [_token_row(row, name, origin, source) for row, name in zip(rows, names, strict=True)]


def _token_row(record: dict[str, Any], identity: str, origin: str, source: str) -> TokenRow:
    ids, mask = record["input_ids"], record.get("loss_mask")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f'{origin}: "input_ids" must be a list of token ids')
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise UserError(f'{origin}: "loss_mask" must be a list of 0 and 1 as long as "input_ids" ({len(ids)})')
    return TokenRow(identity, ids, [bool(m) for m in mask], origin, source)
