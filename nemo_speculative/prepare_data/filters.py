"""What a row must be to train on: an order of roles that a template renders, and text, in whatever language."""

import re
import zlib
from itertools import pairwise
from typing import Any

from nemo_speculative.config.schema import FilterConfig
from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.messages import Message
from nemo_speculative.prepare_data.reasons import LeftOut

FOLLOWERS = {
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
LOOPS_FROM = 2000
"""Bytes from which on a text compresses as well as its content lets it."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


def check(item: dict[str, Any], filters: FilterConfig, keep_unanswered: bool) -> None:
    """
    Raises:
        LeftOut: it is not to be trained on.
    """
    if "input_ids" in item or "rows" in item:
        _check_tokens(item.get("rows", [item]), filters)
    if "conversations" in item:
        _check_order(item["conversations"])
        _check_contents(item["conversations"], keep_unanswered)
        _check_text("\n".join(_texts(item["conversations"])), filters)


def _check_tokens(rows: list[dict[str, Any]], filters: FilterConfig) -> None:
    length = max(len(row["input_ids"]) for row in rows)
    if not any(any(row["loss_mask"]) for row in rows):
        raise LeftOut(reasons.NOTHING_SUPERVISED, f"{length} tokens")
    if filters.max_tokens and length > filters.max_tokens:
        raise LeftOut(reasons.TOO_LONG, f"{length} tokens")


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not roles:
        raise LeftOut(reasons.EMPTY_CONTENT, "no messages")
    start = roles[1:] if roles[0] == "system" else roles
    if start[:1] == ["assistant"]:
        raise LeftOut(reasons.STARTS_WITH_ASSISTANT, _shown(roles))
    out_of_order = any(after not in FOLLOWERS[role] for role, after in pairwise(roles))
    if start[:1] != ["user"] or out_of_order:
        raise LeftOut(reasons.ROLES_OUT_OF_ORDER, _shown(roles))


def _shown(roles: list[str]) -> str:
    return f"{', '.join(roles[:8])}{', …' if len(roles) > 8 else ''}"


def _check_contents(messages: list[Message], keep_unanswered: bool) -> None:
    for index, message in enumerate(messages):
        if not message["content"].strip() and not message.get("tool_calls"):
            raise LeftOut(reasons.EMPTY_CONTENT, f"message {index} ({message['role']})")
    if not keep_unanswered and all(message["role"] != "assistant" for message in messages):
        raise LeftOut(reasons.NO_ANSWER, f"{len(messages)} messages")


def _texts(messages: list[Message]) -> list[str]:
    return [text for m in messages for text in (m["content"], m.get("reasoning_content")) if text]


def _check_text(text: str, filters: FilterConfig) -> None:
    length = len(text)
    if length < filters.min_characters:
        raise LeftOut(reasons.TOO_SHORT, f"{length} characters")
    if filters.max_characters and length > filters.max_characters:
        raise LeftOut(reasons.TOO_LONG, f"{length} characters")
    control = len(CONTROL.findall(text))
    plain = text.encode(errors="ignore")
    if control > filters.max_control_share * length or plain != text.encode(errors="replace"):
        raise LeftOut(reasons.CONTROL_CHARACTERS, f"{control} of {length} characters")
    if len(plain) >= LOOPS_FROM and len(zlib.compress(plain, 1)) < filters.min_variety * len(plain):
        raise LeftOut(reasons.REPETITIVE, f"{len(plain)} bytes compress to {len(zlib.compress(plain, 1))}")
