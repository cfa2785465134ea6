"""Work in a thread beside the main one, whose failure ends what the main thread does meanwhile."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Background:
    """``work`` under way; see :func:`beside`."""

    def __init__(self, work: Callable[[Callable[[], None]], object]):
        self.failure: BaseException | None = None
        self._stop, self._awaited, self._turn = threading.Event(), False, threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self, work: Callable[[Callable[[], None]], object]) -> None:
        try:
            work(self._go_on)
        except _StoppedError:
            return
        except BaseException as error:
            with self._turn:
                self.failure = error
                if not self._awaited:
                    _interrupt_main_thread()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def wait(self) -> None:
        """Until it is done.

        Raises:
            BaseException: what the work raised.
        """
        with self._turn:
            self._awaited = True
        self._thread.join()
        if self.failure:
            raise self.failure

    def end(self) -> None:
        """Ends it at the next of its calls."""
        with self._turn:
            self._awaited = True  # nobody is left to be interrupted
        self._stop.set()
        self._thread.join()


class _StoppedError(Exception):
    pass


@contextmanager
def beside(work: Callable[[Callable[[], None]], object]) -> Iterator[Background]:
    """Starts ``work(go_on)`` in a thread; what it raises before it is waited for is raised here, at once.

    Args:
        work: calls ``go_on`` now and then, which raises when nobody wants the rest any more.
    """
    background = Background(work)
    try:
        try:
            background.start()
            yield background
        finally:
            background.end()
    except KeyboardInterrupt:
        if background.failure is None:  # the user's own
            raise
        raise background.failure from None


def _interrupt_main_thread() -> None:
    # By a real signal, which also ends what sleeps or reads; where Ctrl-C means something else it is left alone.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
