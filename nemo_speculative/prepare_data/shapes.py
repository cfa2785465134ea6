"""The shapes that conversations come in, recognised by their keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.messages import Message, is_messages, read_messages
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.prepare_data.tools import read_calls, read_tools

Record = dict[str, Any]
Item = dict[str, Any]
"""``conversations`` and maybe ``tools``, or ``rows`` of ids as a target generated them; or ``input_ids`` and
``loss_mask``; or ``text``."""

CHAT = ("messages", "conversations", "conversation")
QUESTION = ("instruction", "question", "prompt", "query", "problem", "input")
ANSWER = ("output", "response", "completion", "solution", "answer")
"""A solution comes before what it ends in."""
SYSTEM = ("system", "system_prompt")
MASK = ("loss_mask", "assistant_mask", "assistant_masks", "labels")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Form:
    """A shape."""

    keys: str
    """As one would describe it."""
    fits: Callable[[Record], bool]
    read: Callable[[Record], Item]
    """Raises LeftOut where the values are not what the keys promise."""


def recognise(record: Record) -> Item:
    """What the first form that fits reads of it.

    Raises:
        LeftOut: none fits, or the one that does cannot read it.
    """
    form = next((form for form in FORMS if form.fits(record)), None)
    if form is None:
        raise LeftOut(reasons.UNKNOWN_SHAPE, f"the keys {', '.join(sorted(record)) or '(none)'}")
    return form.read(record)


def _first(record: Record, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _chat_key(record: Record) -> str | None:
    return next((key for key in CHAT if is_messages(record.get(key)) or record.get(key) == []), None)


def _read_chat(record: Record) -> Item:
    key = _chat_key(record)
    assert key is not None
    return _conversation(record, read_messages(record[key])) | _generated(record)


def _generated(record: Record) -> Item:
    """What recipes/generate_data.py put beside the messages: to tokenise these anew would give other ids."""
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "input_ids" in row for row in rows):
        return {}  # somebody else's rows
    source = {"source": str(record["source"])} if record.get("source") else {}
    return {"rows": [_read_ids(row) for row in rows]} | source


def _read_calls(record: Record) -> Item:
    calls = {"role": "assistant", "content": "", "tool_calls": read_calls(record["answers"])}
    return _conversation(record, [_said("user", record["query"]), calls])


def _read_pair(record: Record) -> Item:
    key = _first(record, QUESTION) or ""
    asked, answer = record[key], _first(record, ANSWER)
    more = record.get("input") if key != "input" else None
    if more and is_messages(asked):
        raise LeftOut(reasons.UNKNOWN_SHAPE, f"input beside a {key} of messages")
    if more:
        asked = "\n\n".join(_said("user", text)["content"] for text in (asked, more))
    messages = read_messages(asked) if is_messages(asked) else [*_history(record), _said("user", asked)]
    return _conversation(record, messages + (_answered(record[answer]) if answer else []))


def _answered(given: Any) -> list[Message]:
    return read_messages(given) if is_messages(given) else [_said("assistant", given)]


def _history(record: Record) -> list[Message]:
    """Earlier turns, pairs of question and answer."""
    return [
        _said(role, text)
        for pair in record.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=False)
    ]


def _said(role: str, text: Any) -> Message:
    if not isinstance(text, str):
        raise LeftOut(reasons.NOT_TEXT, f"{text!r:.80}")
    return {"role": role, "content": text}


def _conversation(record: Record, messages: list[Message]) -> Item:
    system = next((record[key] for key in SYSTEM if isinstance(record.get(key), str) and record[key].strip()), None)
    if system and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
    tools = read_tools(record.get("tools"))
    return {"conversations": messages} | ({"tools": tools} if tools else {})


def _read_ids(record: Record) -> Item:
    key = _first(record, MASK) or MASK[0]
    ids, mask = record["input_ids"], record.get(key)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise LeftOut(reasons.BAD_IDS, f"input_ids {ids!r:.60}")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(isinstance(m, int | bool) for m in mask):
        raise LeftOut(reasons.BAD_IDS, f"{key} {mask!r:.60} beside {len(ids)} ids")
    supervised = [m != IGNORED_LABEL for m in mask] if key == "labels" else mask
    if not all(m in (0, 1) for m in supervised):
        raise LeftOut(reasons.BAD_IDS, f"{key} holds other than 0 and 1")
    return {"input_ids": ids, "loss_mask": [int(m) for m in supervised]}


FORMS = (
    Form(
        f"input_ids with {' or '.join(MASK)}",
        lambda record: "input_ids" in record and _first(record, MASK) is not None,
        _read_ids,
    ),
    Form(
        f"{' or '.join(CHAT)} (a list of role/content or from/value)",
        lambda record: _chat_key(record) is not None,
        _read_chat,
    ),
    Form(
        "query, tools and answers (calls)",
        lambda record: all(isinstance(record.get(key), str | list) for key in ("query", "tools", "answers")),
        _read_calls,
    ),
    Form(
        f"one of {', '.join(QUESTION)} with one of {', '.join(ANSWER)}",
        lambda record: (
            _first(record, QUESTION) not in (None, _first(record, ANSWER)) and _first(record, ANSWER) is not None
        ),
        _read_pair,
    ),
    Form(
        "text (formatted; needs tokenizer=)",
        lambda record: isinstance(record.get("text"), str),
        lambda r: {"text": r["text"]},
    ),
    Form(
        "prompt, question or instruction (no answer)", lambda record: _first(record, QUESTION) is not None, _read_pair
    ),
)
"""Those that say most come first: rows often hold their conversation in several shapes."""


def known() -> str:
    """Every form, in a line."""
    return "; ".join(form.keys for form in FORMS)
