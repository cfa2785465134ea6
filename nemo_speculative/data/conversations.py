"""Conversations: the lines of a data file parsed into them, sequences of them, and their split into two sides.

A file's conversations are read when they are indexed; only the line offsets are in memory.
"""

import hashlib
import json
import os
import random
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool")
SPLIT_SALT = "side in training:"
"""A prepared file holds one side of an earlier split by id, so a training's own split hashes ids with this salt."""


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


Item = Conversation | TokenRow


def parse_line(line: bytes, origin: str, number: str) -> list[Item]:
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


class Indexed(Sequence[T]):
    """A sequence whose elements are made when they are read; a slice is a list of them."""

    @abstractmethod
    def _item(self, index: int) -> T:
        """The element at 0 <= ``index`` < len(self)."""

    def _slice(self, indices: range) -> Sequence[T]:
        return [self._item(index) for index in indices]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))


class Conversations(Indexed[Item]):
    """A sequence of conversations and token rows; a slice of it, like any selection, is a :class:`Selection`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the content, wherever it is stored."""

    def _slice(self, indices: range) -> "Conversations":
        return Selection(self, array("q", indices))

    def split_fraction(self, index: int) -> float:
        """A number in [0, 1) that depends on the item's id alone, so that a split by it survives added rows."""
        return hash_fraction(self[index].id, SPLIT_SALT)

    def in_order(self) -> "Conversations":
        """The same items in the order of the sequence they were selected from."""
        return self


class Selection(Conversations):
    """The items at ``indices`` of another sequence, in that order."""

    def __init__(self, items: Conversations, indices: array):
        if isinstance(items, Selection):
            outer = items._indices
            items, indices = items._items, array("q", (outer[index] for index in indices))
        self._items: Conversations = items
        self._indices: array = indices

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self._items.fingerprint.encode(), self._indices.tobytes())

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Item:
        return self._items[self._indices[index]]

    def in_order(self) -> Conversations:
        return Selection(self._items, array("q", sorted(self._indices)))

    def split_fraction(self, index: int) -> float:
        return self._items.split_fraction(self._indices[index])


class ConversationList(Conversations):
    """Conversations in memory."""

    def __init__(self, items: Sequence[Item]):
        self._items = items

    @cached_property
    def fingerprint(self) -> str:
        return _digest(*(json.dumps(item_content(item)).encode() for item in self._items))

    def __len__(self) -> int:
        return len(self._items)

    def _item(self, index: int) -> Item:
        return self._items[index]


class ConversationFile(Conversations):
    """The conversations of a JSONL file; every line is checked once, when the file is opened.

    Memory holds some 40 bytes a line; a line is read from disk each time it is indexed.

    Args:
        key: configuration key of the path, for error messages.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or a line of it is malformed; the line is named.
    """

    def __init__(self, path: str | Path, key: str = "data.path"):
        self.path = Path(path)
        if not self.path.is_file():
            problem = "is a directory" if self.path.is_dir() else "does not exist or is not a file"
            raise UserError(f"{key}: {self.path} {problem}; expected a JSONL file")
        # Per item: the offset, length and number of its line, which of the line's items it is, its split fraction.
        self._offsets, self._lengths, self._numbers = array("q"), array("q"), array("q")
        self._parts, self._fractions = array("i"), array("d")
        self._descriptor: int | None = None
        self._digest = self._scan()
        if not self._offsets:
            raise UserError(f"{key}: {self.path} is empty; expected one JSON object a line")

    def _scan(self) -> str:
        digest, offset = hashlib.sha256(), 0
        progress = Progress(f"reading {self.path.name}, bytes", self.path.stat().st_size, quiet=True)
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    self._add(line, offset, number)
                offset += len(line)
                progress.advance(by=len(line))
        progress.close()
        return digest.hexdigest()[:16]

    def _add(self, line: bytes, offset: int, number: int) -> None:
        items = parse_line(line, f"{self.path}:{number}", str(number))
        # Hash of the line's own id: all rows of one conversation are on the same side of a split.
        fraction = hash_fraction(items[0].id.removesuffix("#0") if len(items) > 1 else items[0].id, SPLIT_SALT)
        for part in range(len(items)):
            self._offsets.append(offset)
            self._lengths.append(len(line))
            self._numbers.append(number)
            self._parts.append(part)
            self._fractions.append(fraction)

    @property
    def fingerprint(self) -> str:
        return self._digest

    def __len__(self) -> int:
        return len(self._offsets)

    def _item(self, index: int) -> Item:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        line = os.pread(self._descriptor, self._lengths[index], self._offsets[index])
        number = self._numbers[index]
        return parse_line(line, f"{self.path}:{number}", str(number))[self._parts[index]]

    def split_fraction(self, index: int) -> float:
        return self._fractions[index]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def split_by_hash(items: Conversations, held_out: float) -> tuple[Conversations, Conversations]:
    """The training and the held-out side: an item is held out if its split fraction is below ``held_out``.

    Where none of a few items is below it, those with the last id are held out.
    """
    fractions = array("d", (items.split_fraction(index) for index in range(len(items))))
    if held_out and fractions and not any(fraction < held_out for fraction in fractions):
        last = fractions[-1]
        if any(fraction != last for fraction in fractions):
            fractions = array("d", (-1.0 if fraction == last else fraction for fraction in fractions))
    sides = (array("q"), array("q"))
    for index, fraction in enumerate(fractions):
        sides[fraction < held_out].append(index)
    return Selection(items, sides[False]), Selection(items, sides[True])


def shuffled(items: Conversations, seed: int) -> Conversations:
    """All items, in an order that depends on the seed and their number alone."""
    order = array("q", range(len(items)))
    random.Random(seed).shuffle(order)
    return Selection(items, order)


def item_content(item: Item) -> list[Any]:
    """Everything that identifies an item: its id, source and content, but not its origin."""
    if isinstance(item, Conversation):
        return [item.id, item.source, item.messages, item.tools]
    return [item.id, item.source, item.input_ids, item.loss_mask]


def hash_fraction(identity: str, salt: str = "") -> float:
    """A number in [0, 1), uniform over ids and independent for different ``salt``."""
    return int.from_bytes(hashlib.sha256((salt + identity).encode()).digest()[:4], "big") / 2**32


def _digest(*pieces: bytes) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """The conversations of a run: for training, and held out for validation and evaluation."""

    training: Conversations
    held_out: Conversations


def load_jsonl(config: DataConfig, seed: int) -> Split:
    """A JSONL file, and as held out a second one, or a share of the first chosen by the hash of the id.

    Raises:
        UserError: a file is missing, empty or malformed, or one side of the split is empty.
    """
    training: Conversations = ConversationFile(config.path or "")
    count = len(training)
    if config.held_out_path:
        held_out: Conversations = ConversationFile(config.held_out_path, "data.held_out_path")
    else:
        training, held_out = split_by_hash(training, config.held_out_share)
    if not training:
        raise UserError(f"data: {count} conversations leave nothing to train on; lower data.held_out_share")
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
