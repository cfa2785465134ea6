"""The one kind of error that a user is meant to read."""

import sys


class UserError(Exception):
    """Bad input.  One line: the key or file, what was found, what was expected, what to do.

    Entry points print it without a traceback and exit with ``exit_code``.
    """

    exit_code = 1


class UsageError(UserError):
    """A command line that cannot be carried out."""

    exit_code = 2


def named(error: Exception, most: int = 200) -> str:
    """``error`` of somebody else's as a part of one line: its class and so many letters of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def report(error: Exception | str) -> None:
    """Prints ``error`` to stderr as one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
