"""A JSONL file that grows line by line, survives any end of its writer, and ends up in the order of the input."""

import json
import os
import re
import time
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nemo_speculative.utils.errors import UserError

PREFIX = re.compile(rb'\{"index": (\d+)(, "asked": "([0-9a-f]{16})", )')
SYNC_SECONDS = 1.0
CHUNK = 1 << 16
"""Bytes of a file's end that are looked through at a time."""


@dataclass(frozen=True)
class Entry:
    """One line."""

    index: int
    """Which line of the input it is about."""
    asked: int
    """64 bits that tell the question of that line from others."""
    offset: int
    """Where it begins, in bytes."""
    line: bytes
    where: str
    """``file:number`` of the line, from 1 on."""

    def record(self) -> dict[str, Any]:
        """What the line says.

        Raises:
            UserError: it is damaged.
        """
        try:
            return json.loads(self.line)
        except ValueError:
            raise self.damaged() from None

    def damaged(self) -> UserError:
        return _refusal(self.where, self.line)

    def at(self, index: int) -> bytes:
        """The line, about another line of the input."""
        found = PREFIX.match(self.line)
        assert found is not None
        return b'{"index": %d' % index + self.line[found.start(2) :]


def entries(file: Path) -> Iterator[Entry]:
    """The lines of a journal that are whole now, one at a time, also while another process appends to it.

    Raises:
        UserError: a line is not a journal's.
    """
    if not file.is_file():
        return
    # Found first: what was cut off behind it may give way to other lines while those before it are read.
    offset, end = 0, _end_of_lines(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if offset >= end:
                return
            found = PREFIX.match(line)
            if found is None:
                raise _refusal(f"{file}:{number}", line)
            yield Entry(int(found[1]), int(found[3], 16), offset, line, f"{file}:{number}")
            offset += len(line)


def _end_of_lines(file: Path) -> int:
    """In bytes, where the last whole line ends: what lies before it does not change."""
    with file.open("rb", buffering=0) as lines:
        end = lines.seek(0, os.SEEK_END)
        while end:
            start = max(end - CHUNK, 0)
            newline = os.pread(lines.fileno(), end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _refusal(where: str, line: bytes) -> UserError:
    return UserError(
        f"{where}: not a line that was written here ({line[:40]!r}); restore the file, or remove that line, "
        "and what it was about is answered again"
    )


class AppendLog:
    """Appends to ``file``; a line that a kill or a full disk cut off is taken away first.

    Raises:
        UserError: a line of the file is not a journal's.
    """

    def __init__(self, file: Path):
        self.file, self.size, self._synced = file, 0, time.monotonic()
        for entry in entries(file):
            self.size = entry.offset + len(entry.line)
        self._out = file.open("ab", buffering=0)
        self._out.truncate(self.size)

    def append(self, index: int, asked: int, record: dict[str, Any]) -> None:
        """Writes a line, see :class:`Entry`; what is older than a second or so is on the disk when it returns.

        Raises:
            OSError: there is no room; the file is as it was.
        """
        self.append_line(_encoded({"index": index, "asked": f"{asked:016x}", **record}) + b"\n")

    def append_line(self, line: bytes) -> None:
        """The same of a line that was written before."""
        try:
            written = 0
            while written < len(line):
                written += self._out.write(line[written:])
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            self._out.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        self.size += len(line)

    def _sync(self) -> None:
        os.fsync(self._out.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Writes all through to the disk."""
        self._sync()
        self._out.close()


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(record).encode()


def put_in_order(file: Path, dropped: Collection[int] = ()) -> None:
    """Sorts a journal that nobody writes by index, in the place of the old one at once.

    Of several lines of an index the last stays; of those in ``dropped``, none.  One line at a time is in memory.

    Raises:
        OSError: there is no room for the sorted copy; the file is as it was.
    """
    if not file.is_file():
        return
    indices, offsets = array("q"), array("q")
    for entry in entries(file):
        indices.append(entry.index)
        offsets.append(entry.offset)
    order = sorted(range(len(indices)), key=indices.__getitem__)
    kept = [n for n, after in zip_longest(order, order[1:]) if after is None or indices[after] != indices[n]]
    kept = [n for n in kept if indices[n] not in dropped]
    if len(kept) == len(indices) and kept == sorted(kept):
        return
    replace(file, _lines_at(file, [offsets[n] for n in kept]))


def _lines_at(file: Path, offsets: Iterable[int]) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            yield lines.readline()


def replace(file: Path, lines: Iterable[bytes]) -> None:
    """Writes ``lines`` in the place of a journal that nobody writes, at once.

    Raises:
        OSError: there is no room for the copy; the file is as it was.
    """
    copy = file.with_suffix(".sorted")
    try:
        with copy.open("wb") as out:
            out.writelines(lines)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        copy.unlink(missing_ok=True)
        raise
    os.replace(copy, file)
