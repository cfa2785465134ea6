"""Where the time of a step goes, and the memory it takes."""

import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

GIB = 1 << 30


OF_ITS_OWN = "of its own"


class Lap(NamedTuple):
    """Of the time since the lap before."""

    wall: float
    """Seconds."""
    shares: dict[str, float]
    """Of each part."""
    alone: float
    """Seconds of what waited for no other rank."""


class StepTimer:
    """Seconds spent in named parts since the last :meth:`lap`; on CUDA by events, without a synchronisation."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()
        self.turns, self.current = 0, ""
        """Parts that were entered or left so far, and the one that is under way."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside towards ``name``."""
        self._turn(name)
        yield from self._timed(name)
        self._turn("")

    def _turn(self, part: str) -> None:
        self.turns, self.current = self.turns + 1, part

    def _timed(self, name: str) -> Iterator[None]:
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Counts what happens inside, within a part, as computed without waiting for another rank."""
        yield from self._timed(OF_ITS_OWN)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens inside belongs to no lap."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def lap(self) -> Lap:
        """What was counted since the last one."""
        if self.cuda:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        wall, self._since = now - self._since, now
        alone = self._seconds.pop(OF_ITS_OWN, 0.0)
        shares = {name: seconds / max(wall, 1e-9) for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return Lap(wall, shares, alone)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory taken so far: of the CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
