"""Conversations as sequences that hold none of them: where each lies is in memory, what it says stays on the disk."""

import hashlib
import json
import os
import random
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_speculative.data.conversation import Conversation, TokenRow, parse_line
from nemo_speculative.data.indexed import Indexed
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

Item = Conversation | TokenRow
SIDE = "side in training:"
"""What decides a side of a training's split is drawn anew: a prepared file holds one side of an earlier split."""


class Items(Indexed[Item]):
    """A sequence of items; slices of it, like every choice among them, are :class:`Chosen`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of what they say: equal for equal content, wherever it lies."""

    def _slice(self, indices: range) -> "Items":
        return Chosen(self, array("q", indices))

    def share(self, index: int) -> float:
        """A number in [0, 1) that depends on the item's id alone, so that a split survives added rows."""
        return share_of(self[index].id, SIDE)

    def in_order(self) -> "Items":
        """The same items as they lie in what they were chosen from."""
        return self


class Chosen(Items):
    """Those of ``items`` that ``indices`` names, in that order."""

    _items: Items
    _indices: array

    def __init__(self, items: Items, indices: array):
        if isinstance(items, Chosen):
            theirs = items._indices
            items, indices = items._items, array("q", (theirs[index] for index in indices))
        self._items, self._indices = items, indices

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self._items.fingerprint.encode(), self._indices.tobytes())

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Item:
        return self._items[self._indices[index]]

    def in_order(self) -> Items:
        return Chosen(self._items, array("q", sorted(self._indices)))

    def share(self, index: int) -> float:
        return self._items.share(self._indices[index])


class Listed(Items):
    """Items that are in memory."""

    def __init__(self, items: Sequence[Item]):
        self._items = items

    @cached_property
    def fingerprint(self) -> str:
        return _digest(*(json.dumps(content_of(item)).encode() for item in self._items))

    def __len__(self) -> int:
        return len(self._items)

    def _item(self, index: int) -> Item:
        return self._items[index]


def content_of(item: Item) -> list[Any]:
    """All that it says, its id and source among it."""
    if isinstance(item, Conversation):
        return [item.id, item.source, item.messages, item.tools]
    return [item.id, item.source, item.input_ids, item.loss_mask]


class JsonLines(Items):
    """The items of a JSONL file; every line is checked once, at the start.

    Args:
        key: where the path was configured, for error messages.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or a line of it is malformed; the line is named.
    """

    def __init__(self, path: str | Path, key: str = "data.path"):
        self.path = Path(path)
        if not self.path.is_file():
            found = "is a directory" if self.path.is_dir() else "does not exist or is not a file"
            raise UserError(f"{key}: {self.path} {found}; expected a JSONL file")
        self._starts, self._bytes, self._numbers = array("q"), array("q"), array("q")
        self._parts = array("i")
        """Which of a line's items it is."""
        self._shares = array("d")
        self._descriptor: int | None = None
        self._digest = self._scan()
        if not self._starts:
            raise UserError(f"{key}: {self.path} is empty; expected one JSON object a line")

    def _scan(self) -> str:
        digest, start = hashlib.sha256(), 0
        progress = Progress(f"reading {self.path.name}, bytes", self.path.stat().st_size, quiet=True)
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    self._add(line, start, number)
                start += len(line)
                progress.advance(by=len(line))
        progress.close()
        return digest.hexdigest()[:16]

    def _add(self, line: bytes, start: int, number: int) -> None:
        items = parse_line(line, f"{self.path}:{number}", str(number))
        # Of the line's own id: what one conversation became lies on one side of a split.
        share = share_of(items[0].id.removesuffix("#0") if len(items) > 1 else items[0].id, SIDE)
        for part in range(len(items)):
            self._starts.append(start)
            self._bytes.append(len(line))
            self._numbers.append(number)
            self._parts.append(part)
            self._shares.append(share)

    @property
    def fingerprint(self) -> str:
        return self._digest

    def __len__(self) -> int:
        return len(self._starts)

    def _item(self, index: int) -> Item:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        line = os.pread(self._descriptor, self._bytes[index], self._starts[index])
        number = self._numbers[index]
        return parse_line(line, f"{self.path}:{number}", str(number))[self._parts[index]]

    def share(self, index: int) -> float:
        return self._shares[index]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def split_by_share(items: Items, held_out: float) -> tuple[Items, Items]:
    """Those whose share is not below ``held_out``, and those whose share is.

    A few items may have none below it; those of the last id are kept out all the same.
    """
    shares = array("d", (items.share(index) for index in range(len(items))))
    if held_out and shares and not any(share < held_out for share in shares):
        last = shares[-1]
        if any(share != last for share in shares):
            shares = array("d", (-1.0 if share == last else share for share in shares))
    sides = (array("q"), array("q"))
    for index, share in enumerate(shares):
        sides[share < held_out].append(index)
    return Chosen(items, sides[False]), Chosen(items, sides[True])


def shuffled(items: Items, seed: int) -> Items:
    """All of them, in an order that depends on the seed and their number alone."""
    order = array("q", range(len(items)))
    random.Random(seed).shuffle(order)
    return Chosen(items, order)


def share_of(identity: str, drawn_for: str = "") -> float:
    """In [0, 1), evenly over ids, and independent for what is ``drawn_for`` another purpose."""
    return int.from_bytes(hashlib.sha256((drawn_for + identity).encode()).digest()[:4], "big") / 2**32


def _digest(*pieces: bytes) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:16]
