"""Work in a background thread whose failure interrupts the main thread."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Work = Callable[[Callable[[], None]], object]
"""Called with ``check_cancelled``, which it calls now and then, and which raises once the work is no longer needed."""


class _CancelledError(Exception):
    pass


class BackgroundTask(threading.Thread):
    """Work that runs in a thread; see :func:`background_task`."""

    def __init__(self, work: Work):
        super().__init__(name="background", daemon=True)
        self.failure: BaseException | None = None
        self._work, self._cancelled, self._awaited, self._mutex = work, threading.Event(), False, threading.Lock()

    def run(self) -> None:
        try:
            self._work(self._check_cancelled)
        except _CancelledError:
            return
        except BaseException as error:
            with self._mutex:
                self.failure = error
                # A real signal also ends a sleep or a read; where SIGINT has another handler it is not sent.
                if not self._awaited and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise _CancelledError

    def wait(self) -> None:
        """Waits until the work is done, and raises its error."""
        self.join()
        if self.failure:
            raise self.failure

    def cancel(self) -> None:
        """Ends the work at its next call of ``check_cancelled``; an error that it then raises interrupts nothing."""
        self._await()
        self._cancelled.set()
        self.join()

    def join(self, timeout: float | None = None) -> None:
        self._await()
        super().join(timeout)

    def _await(self) -> None:
        with self._mutex:
            self._awaited = True  # from now on the main thread is not interrupted


@contextmanager
def background_task(work: Work) -> Iterator[BackgroundTask]:
    """Runs ``work`` in a thread; its error is raised in the block at once, unless the block waits for it."""
    task = BackgroundTask(work)
    try:
        try:
            task.start()
            yield task
        finally:
            task.cancel()
    except KeyboardInterrupt:
        if task.failure is None:  # Ctrl-C
            raise
        raise task.failure from None
