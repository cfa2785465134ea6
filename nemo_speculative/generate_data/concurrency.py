"""Coroutines for long jobs: many at a time, and ended cleanly by Ctrl-C and SIGTERM."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
RunCoroutine: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine to its end; all of a job run in one event loop."""


async def for_each(items: Iterable[T], handle: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Calls ``handle`` for ``items`` in order, up to ``concurrency`` at a time; reads each item when it is its turn.

    Raises:
        Exception: the first that a handler raises; the other handlers are canceled.
    """
    iterator = iter(items)

    async def work() -> None:
        for item in iterator:
            await handle(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


@contextmanager
def interruptible() -> Iterator[RunCoroutine]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside: at once, or after the running coroutine was canceled.

    Where Ctrl-C is ignored, as in a script's background jobs, it stays ignored; SIGTERM works there too.
    """
    running: list[asyncio.Task[Any]] = []

    def interrupt(*_: object) -> None:
        if not running:
            raise KeyboardInterrupt
        running[0].get_loop().call_soon_threadsafe(running[0].cancel)

    async def cancellable(coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        running.append(task)
        try:
            return await coroutine
        finally:
            running.clear()

    with asyncio.Runner() as runner:

        def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            try:
                return runner.run(cancellable(coroutine))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None

        ctrl_c_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        handled = [signal.SIGTERM] if ctrl_c_ignored else [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, interrupt) for number in handled}
        try:
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
