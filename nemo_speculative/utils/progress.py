"""A progress bar for anything that takes more than a few seconds.

Neither ``tqdm`` nor ``rich``: in a log file both either redraw with carriage returns or print nothing until the end,
where this adds one line every 15 seconds.
"""

import sys
import time
from collections.abc import Callable

BAR_WIDTH = 24


class Progress:
    """Counts towards ``total`` on standard error: bar, time left, and a note of the caller's.

    Args:
        quiet: print nothing unless it takes longer than a few seconds.
    """

    def __init__(self, title: str, total: int, quiet: bool = False):
        self.title, self.total, self.done, self.quiet = title, total, 0, quiet
        self.started = self.drawn = time.monotonic()
        self.interactive = sys.stderr.isatty()

    def advance(self, note: Callable[[], str] = str, by: int = 1) -> None:
        """Counts ``by`` more; ``note`` is called only when the line is drawn, so it may cost a synchronization."""
        self.done += by
        now = time.monotonic()
        if self.quiet and now - self.started < 3.0:
            return
        if now - self.drawn >= (0.5 if self.interactive else 15.0):
            self.drawn, self.quiet = now, False
            left = duration((now - self.started) / self.done * (self.total - self.done))
            filled = BAR_WIDTH * self.done // max(self.total, 1)
            bar = "#" * filled + "." * (BAR_WIDTH - filled)
            line = f"{self.title} [{bar}] {self.done}/{self.total}  {left} left  {note()}"
            self._print(line, end="" if self.interactive else "\n")

    def _print(self, line: str, end: str) -> None:
        """Prints ``line``, on a terminal in place of the last one."""
        print(f"\r\x1b[K{line}" if self.interactive else line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line with the time it took."""
        if not self.quiet:
            took = duration(time.monotonic() - self.started)
            self._print(f"{self.title}: {self.done} of {self.total} in {took}", end="\n")


def quiet_transformers() -> None:
    """Turns the progress bars of transformers off where standard error is a log file."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar  # late: costs seconds, which --help need not wait

        disable_progress_bar()


def duration(seconds: float) -> str:
    """``75`` → ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
