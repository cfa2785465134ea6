"""The process of one implementation: it runs one pass over the conversations for every line on standard input.

    python -m benchmarks.training_step.worker IMPLEMENTATION SETUP

It writes one line of JSON to standard output when it is ready, and one for every pass.
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
    """Returns a stream to the controller, and redirects the implementation's standard output to standard error."""
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
    """Memory that training adds to a process: its peak minus its resident set when the models were loaded.

    It includes gradients, the optimizer's state and the allocator's free blocks, but neither weights nor libraries.
    """

    def __init__(self) -> None:
        gc.collect()
        # Otherwise the first steps would reuse memory that loading has freed, without growing the process.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux: resets the peak to the present resident set.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_mb("VmRSS")

    def added_mb(self) -> float:
        return _status_mb("VmHWM") - self.before


def peak_of_tensors(work: Callable[[], Any]) -> float:
    """Peak bytes of the tensors that ``work`` allocates in this thread and in autograd's threads.

    torch's profiler misses blocks that other threads, such as gloo's, free: these count as freed when their memory is
    allocated again.
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
    """Peak bytes of a sequence of allocations (address, size) and frees (address, negative size)."""
    sizes: dict[int, int] = {}
    starts: list[int] = []
    alive = most = 0

    def remove(at: int) -> int:
        return sizes.pop(starts.pop(at))

    for start, size in changes:
        at = bisect_left(starts, start)
        if size < 0:
            alive += size if start not in sizes else -remove(at)
            continue
        if at and starts[at - 1] + sizes[starts[at - 1]] > start:
            at -= 1
        while at < len(starts) and starts[at] < start + size:
            alive -= remove(at)
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
