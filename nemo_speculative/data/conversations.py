"""Sequences of conversations: in memory, or in a file of which only the line offsets are in memory."""

import hashlib
import json
import os
import random
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nemo_speculative.data.conversation import Conversation, TokenRow, parse_line
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

T = TypeVar("T")
Item = Conversation | TokenRow
SPLIT_SALT = "side in training:"
"""A prepared file holds one side of an earlier split by id, so a training's own split hashes ids with this salt."""


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
            found = "is a directory" if self.path.is_dir() else "does not exist or is not a file"
            raise UserError(f"{key}: {self.path} {found}; expected a JSONL file")
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
