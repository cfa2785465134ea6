"""Ctrl-C and SIGTERM, heeded in every part of a long job: in coroutines, and in what blocks between them."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine to its end; all of a job in one event loop."""


@contextmanager
def interruptible() -> Iterator[Run]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside: at once, or where a coroutine runs when it has been cancelled.

    Where Ctrl-C is ignored, as by what a script starts in the background, it stays so; SIGTERM is heeded there too.
    """
    under_way: list[asyncio.Task[Any]] = []

    def interrupt(*_: object) -> None:
        if not under_way:
            raise KeyboardInterrupt
        under_way[0].get_loop().call_soon_threadsafe(under_way[0].cancel)

    async def cancellable(coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        under_way.append(task)
        try:
            return await coroutine
        finally:
            under_way.clear()

    with asyncio.Runner() as runner:

        def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            try:
                return runner.run(cancellable(coroutine))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None

        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if n == signal.SIGTERM or not _is_ignored(n)]
        before = {number: signal.signal(number, interrupt) for number in heard}
        try:
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
