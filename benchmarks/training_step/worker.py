"""The process of one implementation: one pass over the conversations for every line on its standard input.

    python -m benchmarks.training_step.worker IMPLEMENTATION SETUP

It says when it is ready, and answers every line, with one JSON object on a line of its standard output.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.training_step.case import Setup
from benchmarks.training_step.implementations.base import Implementation
from benchmarks.training_step.registry import MEDIUM, parse_chosen


def main() -> None:
    replies = take_standard_output()
    chosen, setup = parse_chosen(sys.argv[1]), Setup(Path(sys.argv[2]))
    torch.set_num_threads(setup.case.threads)
    if MEDIUM in chosen.variants:
        torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    implementation = chosen.build(setup)
    versions = {name: version(name) for name in ("torch", *implementation.packages)}
    reply(replies, {"versions": versions, "steps": len(implementation.batches)})
    memory = Memory()
    for _ in sys.stdin:
        reply(replies, measured(implementation) | {"added_mb": memory.added_mb()})
    implementation.close()


def take_standard_output() -> TextIO:
    """A stream to the controller; whatever the implementation prints goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def reply(stream: TextIO, values: dict[str, Any]) -> None:
    print(json.dumps(values), file=stream, flush=True)


def measured(implementation: Implementation) -> dict[str, Any]:
    """Wall and CPU seconds of one pass, and the loss of its first step."""
    wall, cpu = time.perf_counter(), time.process_time()
    losses = [implementation.step(batch) for batch in implementation.batches]
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": losses[0]}


class Memory:
    """What training adds to a process that has loaded its models: its peak over its resident set before the first step.

    So gradients, the optimizer's state and what the allocator keeps are in it, the weights and the libraries are not.
    """

    def __init__(self) -> None:
        gc.collect()
        # What loading left free inside the process would be taken by the first steps unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux: sets the peak back to the present.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_mb("VmRSS")

    def added_mb(self) -> float:
        return _status_mb("VmHWM") - self.before


def peak_of_tensors(work: Callable[[], Any]) -> float:
    """The most bytes of tensors that were alive at once of what ``work`` made in this thread and in autograd's.

    torch's profiler does not see what another thread frees, such as those of gloo: a block is also gone when its memory
    is given out again.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return most_alive((event["args"]["Addr"], event["args"]["Bytes"]) for event in changes)


def most_alive(changes: Iterable[tuple[int, int]]) -> int:
    """The most bytes at once of blocks made (an address and a size) and freed (its negative), one after the other."""
    sizes: dict[int, int] = {}
    starts: list[int] = []
    alive = most = 0

    def forget(at: int) -> int:
        return sizes.pop(starts.pop(at))

    for start, size in changes:
        at = bisect_left(starts, start)
        if size < 0:
            alive += size if start not in sizes else -forget(at)
            continue
        if at and starts[at - 1] + sizes[starts[at - 1]] > start:
            at -= 1
        while at < len(starts) and starts[at] < start + size:
            alive -= forget(at)
        starts.insert(at, start)
        sizes[start] = size
        alive += size
        most = max(most, alive)
    return most


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kilobytes) * 1024 / 1e6


if __name__ == "__main__":
    main()
