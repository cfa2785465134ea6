"""Many things under way at once, drawn one by one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def in_parallel(items: Iterable[T], handle: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Handles ``items`` in their order, so many at once; they are drawn one by one.

    Raises:
        Exception: the first that a handler raises; the others are given up.
    """
    drawn = iter(items)

    async def work() -> None:
        for item in drawn:
            await handle(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
