"""An append-only JSONL file that survives any end of its writer."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.utils.files import atomic_write

TAIL_BYTES = 1 << 16
"""Bytes read at once while the last newline is searched from the end of a file."""


@dataclass(frozen=True)
class Line:
    """A complete line of a log."""

    number: int
    """Number of the line, from 1."""
    offset: int
    """Offset of the line in the file, in bytes."""
    data: bytes
    """The line's bytes, newline included."""


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of ``file`` that are complete now, one at a time, also while another process appends to it.

    A missing file has no lines.  A last line without a newline, which a kill or a full disk cut off, is left out.
    """
    if not file.is_file():
        return
    # The end is found first: a torn line may be replaced by others while the lines before it are read.
    offset, end = 0, complete_size(file)
    with file.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            if offset >= end:
                return
            yield Line(number, offset, data)
            offset += len(data)


def complete_size(file: Path) -> int:
    """Bytes up to the end of the last complete line; 0 for a missing file."""
    if not file.is_file():
        return 0
    with file.open("rb", buffering=0) as lines:
        end = lines.seek(0, os.SEEK_END)
        while end:
            start = max(end - TAIL_BYTES, 0)
            newline = os.pread(lines.fileno(), end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


class AppendLog:
    """Appends lines to ``file``, which is created if need be; a torn last line is removed first.

    Args:
        sync_seconds: lines older than this are on disk when an append returns; 0 writes each one through.
        size: bytes to keep, where a checkpoint vouches for no more; None keeps every complete line.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, file: Path, *, sync_seconds: float = 1.0, size: int | None = None):
        self.file, self.sync_seconds = file, sync_seconds
        self.size = complete_size(file) if size is None else size
        """Bytes of the lines written so far."""
        self._out = file.open("ab", buffering=0)
        self._out.truncate(self.size)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Writes ``record`` as a line of JSON.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        self.append_line(encode(record))

    def append_line(self, line: bytes) -> None:
        """Writes ``line``, which ends with a newline; same errors as :meth:`append`."""
        try:
            written = 0
            while written < len(line):
                written += self._out.write(line[written:])
            if time.monotonic() - self._synced >= self.sync_seconds:
                self.sync()
        except OSError as error:
            self._out.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        self.size += len(line)

    def sync(self) -> None:
        """Waits until everything written is on disk."""
        os.fsync(self._out.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Writes everything through to the disk and closes the file."""
        self.sync()
        self._out.close()


def encode(record: dict[str, Any]) -> bytes:
    """``record`` as a line of JSON in UTF-8; a lone surrogate, which UTF-8 lacks, is escaped."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def rewrite(file: Path, lines: Iterable[bytes]) -> None:
    """Replaces the content of a log that no process writes, in one step.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    with atomic_write(file) as out:
        out.writelines(lines)
