"""The device of this process, copies to it, and the time that work on it takes."""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from nemo_speculative.utils.errors import UserError

LOCAL = "rank-local"


def choose_device(name: str, key: str) -> torch.device:
    """The device of this rank for ``name``, the value of ``key``: auto, cpu or cuda; UserError if there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{key} is {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}=cuda: torch {torch.__version__} finds no CUDA device; use {key}=cpu, or a machine with a GPU and a "
            "CUDA build of torch"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device``; a copy from the CPU to CUDA goes through pinned memory, so that nothing waits for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class StepTimes(NamedTuple):
    """Seconds since the last :meth:`StepTimer.reset`, the share of each section, and seconds of rank-local work."""

    wall: float
    shares: dict[str, float]
    local: float


class StepTimer:
    """Measures named sections since the last :meth:`reset`; on CUDA by events, without synchronization."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()
        self.sections, self.current = 0, ""
        """Number of sections entered or left so far, and the name of the current one."""

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the time inside towards ``name``."""
        self.sections, self.current = self.sections + 1, name
        with self._measure(name):
            yield
        self.sections, self.current = self.sections + 1, ""

    def local(self) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside, part of a section, as rank-local: it waits for no other rank."""
        return self._measure(LOCAL)

    @contextlib.contextmanager
    def _measure(self, name: str) -> Iterator[None]:
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
    def excluded(self) -> Iterator[None]:
        """Leaves the time inside out of the wall time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def reset(self) -> StepTimes:
        """Returns the times since the last call and starts again from zero."""
        if self.cuda:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        wall, self._since = now - self._since, now
        local = self._seconds.pop(LOCAL, 0.0)
        shares = {name: seconds / max(wall, 1e-9) for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return StepTimes(wall, shares, local)
