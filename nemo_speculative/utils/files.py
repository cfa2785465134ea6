"""Files and directories that exist whole or not at all, their manifests, and locks on directories."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from nemo_speculative.utils.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once all of it is on disk; until then an old file stays."""
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
    """Yields an empty directory ``.<name>.partial`` next to ``path``, which becomes ``path`` unless an error occurs."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync(path: Path) -> None:
    """Writes a file or directory through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def disk_full_error(message: str) -> Iterator[None]:
    """Raises UserError with ``message`` where the block finds the disk or the quota full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(message) from None


def write_manifest(file: Path, values: Mapping[str, Any], indent: int | None = 1) -> None:
    """Replaces ``file``, which is written last and records what its directory's content was made from, in one step."""
    atomic_write_text(file, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The values in ``file``; None if it does not exist.  Raises ValueError if it does not hold a JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"found a {type(values).__name__}, expected a JSON object")
    return values


def differing_keys(stored: Mapping[str, Any], expected: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """The keys whose values differ or that only one side has, in the order of ``stored``, then of ``expected``."""
    keys = dict.fromkeys([*stored, *expected])
    return [key for key in keys if key not in ignored and stored.get(key) != expected.get(key)]


def file_sizes(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of the files ``names`` of ``directory`` that exist; a manifest may list them, to tell damage later."""
    files = {name: directory / name for name in names}
    return {name: file.stat().st_size for name, file in files.items() if file.is_file()}


@contextmanager
def dir_lock(directory: str | Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds ``directory`` exclusively, creating it if need be; killing the process releases it.

    Args:
        key: configuration key that named the directory, for the error.
        wait: wait until the other process is done, instead of raising UserError.
    """
    with _open_lock(directory) as file:
        if not _try_exclusive(file):
            if not wait:
                raise _busy(directory, key)
            if os.environ.get("RANK", "0") == "0":  # the other ranks of a job wait for each other, briefly
                print(f"{key}: another process writes into {directory}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JobLock:
    """Holds a directory for all processes of a job, creating it if need be; killing them releases it.

    ``filelock`` has no such lock: many processes share it, and the last one turns it into an exclusive one.

    Args:
        key: configuration key that named the directory, for the error.
        first: whether this process keeps other jobs out; the job's other processes :meth:`join` later.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, directory: Path, key: str, *, first: bool):
        self._file = _open_lock(directory)
        if first:
            if not _try_exclusive(self._file):
                self._file.close()
                raise _busy(directory, key)
            self.join()

    def join(self) -> None:
        """Shares the lock with the job's other processes."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def leave(self, last: Callable[[], None]) -> None:
        """Releases the lock; the last process to leave calls ``last`` while no other job can take it."""
        with self._file:
            if _try_exclusive(self._file):
                last()


def _open_lock(directory: str | Path) -> IO[str]:
    Path(directory).mkdir(parents=True, exist_ok=True)
    return (Path(directory) / ".lock").open("a")


def _try_exclusive(file: IO[str]) -> bool:
    """Takes ``file`` exclusively if no other process holds it; on failure this process holds nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(directory: str | Path, key: str) -> UserError:
    return UserError(f"{key}: another process writes into {directory}; wait for it, or name another directory")
