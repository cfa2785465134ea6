"""One process, or the processes of one job, write into a directory at a time."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_speculative.distributed.collectives import is_first
from nemo_speculative.utils.errors import UserError


@contextmanager
def dir_lock(directory: str | Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds ``directory``, which is made if it is not there, for this process alone; a kill lets go of it.

    Args:
        key: what named the directory, for the error.
        wait: until another process is done, instead of refusing.

    Raises:
        UserError: another process holds it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / ".lock").open("a") as held:
        if not _taken(held):
            if not wait:
                raise _refusal(directory, key)
            if is_first():  # the others of a job wait for each other, a moment each
                print(f"{key}: another process writes into {directory}; waiting for it", flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


class JobLock:
    """Holds a directory, which is made if it is not there, for all processes of a job; a kill lets go of it.

    Args:
        key: what named the directory, for the error.
        first: whether this process is the one that keeps other jobs out; the others :meth:`join` it later.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, directory: Path, key: str, *, first: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._held = (directory / ".lock").open("a")
        if first:
            if not _taken(self._held):
                self._held.close()
                raise _refusal(directory, key)
            self.join()

    def join(self) -> None:
        """Holds it too, from now on."""
        fcntl.flock(self._held, fcntl.LOCK_SH)

    def leave(self, last: Callable[[], None]) -> None:
        """Lets go of it; the last one to leave calls ``last`` while nobody else can come in."""
        with self._held:
            if _taken(self._held):
                last()


def _taken(file: IO[str]) -> bool:
    """Whether nobody else held ``file``; who did not get it holds nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(directory: str | Path, key: str) -> UserError:
    return UserError(f"{key}: another process writes into {directory}; wait for it, or name another directory")
