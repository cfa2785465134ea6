"""Checks that a row can be trained on: an order of roles that templates render, and text, in any language."""

import hashlib
import re
import zlib
from array import array
from itertools import pairwise
from typing import Any

from nemo_speculative.config.schema import FilterConfig
from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.prepare_data.shapes import Message

NEXT_ROLES = {
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
MIN_BYTES_FOR_VARIETY = 2000
"""From this length on, the compression ratio of a text depends on its content only."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
DIGEST_BYTES = 8
"""Among 10 million rows, two that differ have the same digest with a probability of 3e-6."""
INITIAL_SLOTS = 1 << 10


def check(item: dict[str, Any], filters: FilterConfig, keep_unanswered: bool) -> None:
    """Checks a row.

    Raises:
        LeftOut: it cannot be trained on.
    """
    if "input_ids" in item or "rows" in item:
        rows = item.get("rows", [item])
        length = max(len(row["input_ids"]) for row in rows)
        if not any(any(row["loss_mask"]) for row in rows):
            raise LeftOut(reasons.NOTHING_SUPERVISED, f"{length} tokens")
        if filters.max_tokens and length > filters.max_tokens:
            raise LeftOut(reasons.TOO_LONG, f"{length} tokens")
    if "conversations" in item:
        messages = item["conversations"]
        _check_order(messages)
        for index, message in enumerate(messages):
            if not message["content"].strip() and not message.get("tool_calls"):
                raise LeftOut(reasons.EMPTY_CONTENT, f"message {index} ({message['role']})")
        if not keep_unanswered and all(message["role"] != "assistant" for message in messages):
            raise LeftOut(reasons.NO_ANSWER, f"{len(messages)} messages")
        texts = [text for m in messages for text in (m["content"], m.get("reasoning_content")) if text]
        _check_text("\n".join(texts), filters)


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not roles:
        raise LeftOut(reasons.EMPTY_CONTENT, "no messages")
    shown = f"{', '.join(roles[:8])}{', …' if len(roles) > 8 else ''}"
    first = roles[1:2] if roles[0] == "system" else roles[:1]
    if first == ["assistant"]:
        raise LeftOut(reasons.STARTS_WITH_ASSISTANT, shown)
    if first != ["user"] or any(after not in NEXT_ROLES[role] for role, after in pairwise(roles)):
        raise LeftOut(reasons.ROLES_OUT_OF_ORDER, shown)


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
    if len(plain) >= MIN_BYTES_FOR_VARIETY:
        compressed = len(zlib.compress(plain, 1))
        if compressed < filters.min_variety * len(plain):
            raise LeftOut(reasons.REPETITIVE, f"{len(plain)} bytes compress to {compressed}")


def digest(text: str, person: bytes = b"") -> int:
    """A 64-bit hash, never 0; ``person`` keeps different kinds of text apart."""
    hashed = hashlib.blake2b(text.encode(errors="replace"), digest_size=DIGEST_BYTES, person=person)
    return int.from_bytes(hashed.digest(), "big") or 1


class DigestSet:
    """A set of digests in 16 to 32 bytes each, where Python's set takes a hundred.

    Open addressing with linear probing, at most half full; 0 marks a free slot.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(DIGEST_BYTES * INITIAL_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._slot(value)] == value

    def add(self, value: int) -> None:
        slot = self._slot(value)
        if self._slots[slot] == value:
            return
        self._slots[slot] = value
        self._count += 1
        if 2 * self._count > len(self._slots):
            before, self._slots = self._slots, array("Q", bytes(2 * DIGEST_BYTES * len(self._slots)))
            for each in before:
                if each:
                    self._slots[self._slot(each)] = each

    def _slot(self, value: int) -> int:
        """The slot that holds ``value``, or that it would take."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & mask
        return slot
