"""Files and directories that exist whole or not at all, and the one-line error of a full disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nemo_speculative.utils.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once all of it is on disk; until then an old file stays.

    Raises:
        OSError: no space or no permission to write; names ``path``.
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
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory ``.<name>.partial`` next to ``path``, which becomes ``path`` at the end.

    What a killed run left is removed first, and the partial directory is removed on any error.

    Raises:
        OSError: ``path`` exists and is not empty.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_full_error(message: str) -> Iterator[None]:
    """Turns "no space left" within the block into a one-line error.

    Raises:
        UserError: ``message``, if the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(message) from None
