"""Errors that a user is meant to read, each one line."""

import sys

NO_RESTART_FILE = "NEMO_HOPELESS"
"""Environment variable of a launcher's workers: the file in which ranks note failures that a restart would repeat."""


class UserError(Exception):
    """Bad input.  One line: the key or file, what was found, what was expected, what to do.

    Entry points print it without a traceback and exit with ``exit_code``.  Only after a :class:`PeerLostError` may
    restarting help.
    """

    exit_code = 1


class UsageError(UserError):
    """A command line that cannot be carried out."""

    exit_code = 2


class PeerLostError(UserError):
    """A peer (rank, node or server) is gone.  Restarting may help."""

    exit_code = 138
    """128 + SIGUSR1: schedulers that go by the status take 128 and more for a failure that is worth a retry."""


def describe_error(error: Exception, max_length: int = 200) -> str:
    """A library's ``error`` as part of one line: its class and the first ``max_length`` characters of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:max_length]}"


def print_error(error: Exception | str) -> None:
    """Prints ``error`` to stderr as one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
