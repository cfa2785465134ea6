"""An append-only JSONL file that survives any end of its writer."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_speculative.utils.files import atomic_write

TAIL_BYTES = 1 << 16
"""Bytes read at once while the last newline is searched from the end of a file."""


class Line(NamedTuple):
    """A complete line of a log: its number, from 1, its offset in bytes, and its bytes, newline included."""

    number: int
    offset: int
    data: bytes


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of ``file`` that are complete now, one at a time, also while another process appends to it.

    A missing file has no lines.  A last line without a newline, which a kill or a full disk cut off, is left out.
    """
    # The end is found first: a torn line may be replaced by others while the lines before it are read.
    offset, end = 0, complete_size(file)
    if end:
        with file.open("rb") as lines:
            for number, data in enumerate(lines, start=1):
                if offset >= end:
                    return
                yield Line(number, offset, data)
                offset += len(data)


def complete_size(file: Path) -> int:
    """Bytes up to the end of the last complete line; 0 for a missing file."""
    if file.is_file():
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
    """

    def __init__(self, file: Path, *, sync_seconds: float = 1.0, size: int | None = None):
        self.file, self.sync_seconds = file, sync_seconds
        self.size = complete_size(file) if size is None else size
        """Bytes of the lines written so far."""
        self._out = file.open("ab", buffering=0)
        self._out.truncate(self.size)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Writes ``record`` as a line of JSON, see :meth:`append_line`."""
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate, which UTF-8 lacks, is escaped
            line = json.dumps(record).encode()
        self.append_line(line + b"\n")

    def append_line(self, line: bytes) -> None:
        """Writes ``line``, which ends with a newline.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        try:
            written = 0
            while written < len(line):
                written += self._out.write(line[written:])
            if time.monotonic() - self._synced >= self.sync_seconds:
                self._sync()
        except OSError as error:
            self._out.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        self.size += len(line)

    def _sync(self) -> None:
        os.fsync(self._out.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Writes everything through to the disk and closes the file."""
        self._sync()
        self._out.close()


def rewrite(file: Path, lines: Iterable[bytes]) -> None:
    """Replaces the content of a log that no process writes, in one step; on a full disk it stays as it was."""
    with atomic_write(file) as out:
        out.writelines(lines)
