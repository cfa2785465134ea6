"""The one kind of error that a user is meant to read."""

import sys

NO_RESTART_FILE = "NEMO_HOPELESS"
"""Environment variable of a launcher's workers: a file for the numbers of those that no new start would help."""


class UserError(Exception):
    """Bad input.  One line: the key or file, what was found, what was expected, what to do.

    Entry points print it without a traceback and exit with ``exit_code``.  To start again does not help, but for
    :class:`PeerLostError`.
    """

    exit_code = 1


class UsageError(UserError):
    """A command line that cannot be carried out."""

    exit_code = 2


class PeerLostError(UserError):
    """Somebody whom this program needs is gone: another rank, a node, a server.  To start again may help."""

    exit_code = 138
    """128 + SIGUSR1: schedulers that go by the status take 128 and more for an end that is worth another try."""


def named(error: Exception, most: int = 200) -> str:
    """``error`` of somebody else's as a part of one line: its class and so many letters of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def report(error: Exception | str) -> None:
    """Prints ``error`` to stderr as one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
