"""Conversations: the lines of a data file parsed into them, sequences of them, and their split into two sides."""

import hashlib
import json
import os
import random
import struct
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

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


def item_content(item: Item) -> list[Any]:
    """Everything that identifies an item: its id, source and content, but not its origin."""
    if isinstance(item, Conversation):
        return [item.id, item.source, item.messages, item.tools]
    return [item.id, item.source, item.input_ids, item.loss_mask]


def parse_line(line: bytes, file: Path | str, number: int) -> list[Item]:
    """Parses line ``number`` of a data file: a conversation, a token row, or the token rows of generated answers.

    A line without an id is identified by its number.  Raises UserError if the line is malformed.
    """
    origin = f"{file}:{number}"
    record = parse_json(line, origin)
    identity = str(number if record.get("id") is None else record["id"])
    source = str(record.get("source") or "")
    if "rows" in record:  # as generated: tokenizing the text again could give other ids
        rows = record["rows"]
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "input_ids" in r for r in rows):
            raise UserError(f'{origin}: "rows" must be a list of {{"input_ids", "loss_mask"}}, not {rows!r:.60}')
        names = [identity] if len(rows) == 1 else [f"{identity}#{turn}" for turn in range(len(rows))]
        return [_token_row(row, name, origin, source) for row, name in zip(rows, names, strict=True)]
    if "conversations" in record:
        messages, tools = record["conversations"], record.get("tools")
        _check_messages(messages, origin)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f'{origin}: "tools" must be a list of JSON objects, not {tools!r:.60}')
        return [Conversation(identity, messages, origin, tools or None, source)]
    if "input_ids" in record:
        return [_token_row(record, identity, origin, source)]
    raise UserError(
        f'{origin}: found the keys {sorted(record)}, expected "conversations", or "input_ids" and "loss_mask"; '
        "recipes/prepare_data.py reads other shapes"
    )


def parse_json(line: bytes, origin: str) -> dict[str, Any]:
    """Parses a line as a JSON object; raises UserError if it is none."""
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not JSON ({error.msg}, column {error.colno}); expected one object a line; "
            "recipes/prepare_data.py reads other shapes"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{origin}: found a {type(record).__name__}, expected a JSON object; recipes/prepare_data.py reads other "
            "shapes"
        )
    return record


def _check_messages(messages: Any, origin: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{origin}: "conversations" must be a list of messages, not {messages!r:.60}')
    for index, message in enumerate(messages):
        if problem := _message_problem(message, messages[index - 1] if index else None):
            raise UserError(
                f"{origin}: message {index} {problem}; correct it "
                "(recipes/prepare_data.py reads other names of roles, and leaves out the rows that it cannot use)"
            )


def _message_problem(message: Any, before: dict[str, Any] | None) -> str | None:
    """Why ``message`` is none, or why no chat has it after ``before``, though a template may render it."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return f"is {message!r:.60}, expected a role among {', '.join(ROLES)}"
    role, content = message["role"], message.get("content")
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        return f"has the content {content!r:.60}, expected text"
    if not isinstance(reasoning, str | None):
        return f'has the "reasoning_content" {reasoning!r:.60}, expected text'
    if not isinstance(calls or [], list):
        return f'has the "tool_calls" {calls!r:.60}, expected a list'
    if role == "system" and before:
        return "is the system's, expected first"
    if role == "assistant" and before and before["role"] == "assistant":
        return "is a second answer in a row, expected the user's or a tool's before it"
    text = content or reasoning or calls
    if role in ("user", "assistant") and not (text.strip() if isinstance(text, str) else text):
        return f"of the {role} is empty, expected text"
    return None


def _token_row(record: dict[str, Any], identity: str, origin: str, source: str) -> TokenRow:
    ids, mask = record["input_ids"], record.get("loss_mask")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f'{origin}: "input_ids" must be a list of token ids')
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise UserError(f'{origin}: "loss_mask" must be a list of 0 and 1 as long as "input_ids" ({len(ids)})')
    return TokenRow(identity, ids, [bool(m) for m in mask], origin, source)


class Conversations(Sequence[Item]):
    """A sequence of conversations and token rows; a slice of it, like any selection, is a :class:`Selection`."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content, wherever it is stored."""
        raise NotImplementedError

    @abstractmethod
    def _item(self, index: int) -> Item:
        """The item at 0 <= ``index`` < len(self)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selection(self, array("q", range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))

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

    Memory holds some 40 bytes a line; a line is read from disk each time it is indexed.  Raises UserError, which names
    the line or the configuration ``key`` of the path, if the file is missing or empty, or a line is malformed.
    """

    _ENTRY = struct.Struct("qqqdi")
    """Per item: the offset, length and number of its line, its split fraction, and which of the line's items it is."""

    def __init__(self, path: str | Path, key: str = "data.path"):
        self.path = Path(path)
        if not self.path.is_file():
            problem = "is a directory" if self.path.is_dir() else "does not exist or is not a file"
            raise UserError(f"{key}: {self.path} {problem}; expected a JSONL file")
        self._entries, digest, offset = bytearray(), hashlib.sha256(), 0
        progress = Progress(f"reading {self.path.name}, bytes", self.path.stat().st_size, quiet=True)
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    self._add(line, offset, number)
                offset += len(line)
                progress.advance(by=len(line))
        progress.close()
        self.fingerprint = digest.hexdigest()[:16]
        if not self._entries:
            raise UserError(f"{key}: {self.path} is empty; expected one JSON object a line")

    def _add(self, line: bytes, offset: int, number: int) -> None:
        items = parse_line(line, self.path, number)
        # Hash of the line's own id: all rows of one conversation are on the same side of a split.
        fraction = hash_fraction(items[0].id.removesuffix("#0") if len(items) > 1 else items[0].id, SPLIT_SALT)
        for part in range(len(items)):
            self._entries += self._ENTRY.pack(offset, len(line), number, fraction, part)

    def __len__(self) -> int:
        return len(self._entries) // self._ENTRY.size

    def _item(self, index: int) -> Item:
        offset, length, number, _, part = self._ENTRY.unpack_from(self._entries, index * self._ENTRY.size)
        return parse_line(os.pread(self._file.fileno(), length, offset), self.path, number)[part]

    @property
    def split_fractions(self) -> list[float]:
        """For each item a number in [0, 1) that depends on its line's id alone, so that a split survives added rows."""
        return [fraction for _, _, _, fraction, _ in self._ENTRY.iter_unpack(self._entries)]

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}


def split_by_hash(file: ConversationFile, held_out: float) -> tuple[Conversations, Conversations]:
    """The training and the held-out side: an item is held out if its split fraction is below ``held_out``.

    Where none of a few items is below it, those with the last id are held out.
    """
    fractions = file.split_fractions
    chosen = [fraction < held_out for fraction in fractions]
    if held_out and not any(chosen) and len(set(fractions)) > 1:
        chosen = [fraction == fractions[-1] for fraction in fractions]
    sides = [array("q", (i for i, held in enumerate(chosen) if held == side)) for side in (False, True)]
    return Selection(file, sides[0]), Selection(file, sides[1])


def shuffled(items: Conversations, seed: int) -> Conversations:
    """All items, in an order that depends on the seed and their number alone."""
    order = array("q", range(len(items)))
    random.Random(seed).shuffle(order)
    return Selection(items, order)


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

    Raises UserError if a file is missing, empty or malformed, or if nothing is left to train on.
    """
    file = ConversationFile(config.path or "")
    if config.held_out_path:
        training: Conversations = file
        held_out: Conversations = ConversationFile(config.held_out_path, "data.held_out_path")
    else:
        training, held_out = split_by_hash(file, config.held_out_share)
    if not training:
        raise UserError(f"data: {len(file)} conversations leave nothing to train on; lower data.held_out_share")
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
