"""Files that are there whole or not at all, and the line that a full disk gets."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nemo_speculative.utils.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when all of it is on the disk; one that was there stays until then.

    Raises:
        OSError: there is no room, or no right to write; named by ``path``.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes ``text`` with :func:`atomic_write`; a lone surrogate, which UTF-8 lacks, becomes a question mark."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


@contextmanager
def room_or(said: str) -> Iterator[None]:
    """
    Raises:
        UserError: the disk is full; ``said`` is the line.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(said) from None
