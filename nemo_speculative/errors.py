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


def report(error: Exception | str) -> None:
    """Prints ``error`` to stderr as one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
