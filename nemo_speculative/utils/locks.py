"""Locks on directories: one process, or the processes of one job, writes at a time.

``fcntl.flock`` rather than the ``filelock`` library: both release the lock when the process is killed, but
:class:`JobLock` needs a lock that many processes share and that the last one turns into an exclusive one, which
``filelock.FileLock`` does not offer (its read-write lock is a SQLite database).
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_speculative.utils.errors import UserError


@contextmanager
def dir_lock(directory: str | Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds ``directory`` exclusively, creating it if need be; killing the process releases it.

    Args:
        key: configuration key that named the directory, for the error.
        wait: wait until the other process is done, instead of refusing.

    Raises:
        UserError: another process holds it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / ".lock").open("a") as file:
        if not _try_exclusive(file):
            if not wait:
                raise _busy(directory, key)
            if os.environ.get("RANK", "0") == "0":  # the other ranks of a job wait for each other, briefly
                print(f"{key}: another process writes into {directory}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JobLock:
    """Holds a directory for all processes of a job, creating it if need be; killing them releases it.

    Args:
        key: configuration key that named the directory, for the error.
        first: whether this process keeps other jobs out; the job's other processes :meth:`join` later.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, directory: Path, key: str, *, first: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / ".lock").open("a")
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


def _try_exclusive(file: IO[str]) -> bool:
    """Takes ``file`` exclusively if no other process holds it; on failure this process holds nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(directory: str | Path, key: str) -> UserError:
    return UserError(f"{key}: another process writes into {directory}; wait for it, or name another directory")
