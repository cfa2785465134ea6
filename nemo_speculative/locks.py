"""One process at a time writes into a directory."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_speculative.errors import UserError


@contextmanager
def exclusive(directory: str | Path, key: str, *, wait: bool = False) -> Iterator[None]:
    """Holds ``directory``, which is made if it is not there, for this process alone; a kill lets go of it.

    Args:
        key: what named the directory, for the error.
        wait: until another process is done, instead of refusing.

    Raises:
        UserError: another process holds it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / ".lock").open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{key}: another process writes into {directory}; wait for it, or name another directory"
            ) from None
        yield
