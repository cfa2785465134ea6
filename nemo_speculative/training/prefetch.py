"""Prefetching of what a training step reads: batches packed and scheduled on the host, and the target's outputs.

A thread packs and schedules the next global batch while this one trains.  On CUDA the target computes the next
micro-batch on a stream of its own while the draft trains, unless ranks compute the target together; a remote target is
requested ahead in threads.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.data.batch import Batch, PackedLoader
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.utils.devices import StepTimer
from nemo_speculative.utils.errors import UserError, describe_error

POLL_SECONDS = 0.2
"""Interval at which the wait for a remote target checks whether to stop."""
STOP_SECONDS = 10.0
"""Seconds to wait for an answer after a signal: if it comes, the step ends and is saved."""


class InterruptedTargetError(UserError):
    """A signal arrived while a remote target did not answer."""

    exit_code = 130


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's part of one step's batch."""

    schedules: list[Any]
    """The schedules, one per micro-batch."""
    counts: torch.Tensor
    """float64 [T], on the host: the sum of the schedules' counts."""
    ids: tuple[str, ...]
    """Ids of the conversations in the batch."""
    num_tokens: int
    loader_state: dict[str, int]
    """State of the loader after this batch: a run that has trained on it resumes there."""
    epoch: int


class BatchPrefetcher:
    """Produces the global batches of ``loader`` in a thread, one ahead."""

    def __init__(self, loader: PackedLoader, objective: TTTObjective, device: torch.device):
        self.loader, self.objective, self.device = loader, objective, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._future: Future[GlobalBatch] | None = None

    def next(self) -> GlobalBatch:
        """Returns the next global batch and starts to make the one after it."""
        batch = self.peek()
        self._future = self._thread.submit(self._make)
        return batch

    def peek(self) -> GlobalBatch:
        """Returns what :meth:`next` will return; raises UserError if it could not be made."""
        self._future = self._future or self._thread.submit(self._make)
        try:
            return self._future.result()
        except UserError:
            raise
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            raise UserError(
                f"data: the next batch could not be made ({describe_error(error)}, {Path(last.filename).name}:"
                f"{last.lineno}); if the data changed on disk, restore it, and start again with resume=auto"
            ) from error

    def _make(self) -> GlobalBatch:
        batches = self.loader.next_global_batch()
        schedules = [self.objective.schedule(batch, self.device) for batch in batches]
        return GlobalBatch(
            schedules,
            torch.stack([schedule.counts for schedule in schedules]).sum(0),
            tuple(i for batch in batches for i in batch.ids),
            sum(batch.num_tokens for batch in batches),
            self.loader.state_dict(),
            self.loader.epoch,
        )

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown(cancel_futures=True)


class TargetPrefetcher:
    """Yields the target's outputs for one schedule after another, computed ahead where the target allows it.

    Args:
        stop: set when the run is to stop: a remote target that does not answer is then not waited for any longer.

    Attributes:
        ahead: number of batches computed or requested ahead.
    """

    def __init__(self, target: Target, device: torch.device, timer: StepTimer, stop: threading.Event | None = None):
        self.target, self.timer, self.stop = target, timer, stop or threading.Event()
        # Ranks that compute the target together keep one order of all collectives, on the draft's stream.
        apart = device.type == "cuda" and (target.requests_ahead or not target.collective)
        self.stream = torch.cuda.Stream(device) if apart else None
        self.ahead = target.requests_ahead or int(self.stream is not None)
        self._threads = ThreadPoolExecutor(1 + self.ahead, "target") if target.requests_ahead else None
        self._pending: deque[Callable[[], TargetOutput]] = deque()

    def iterate(
        self, schedules: list[Any], next_schedules: Callable[[], list[Any]]
    ) -> Iterator[tuple[Any, TargetOutput]]:
        """Yields each schedule with the target's output.

        Args:
            next_schedules: returns the schedules of the next call.
        """
        for n, schedule in enumerate(schedules):
            upcoming, depth = schedules[n:], 1 + self.ahead
            if depth > len(upcoming):
                upcoming = upcoming + next_schedules()
            for other in upcoming[len(self._pending) : depth]:
                self._pending.append(self._start(other.batch))
            yield schedule, self._pending.popleft()()

    def compute_now(self, batch: Batch) -> TargetOutput:
        """The target's output for a batch out of order; outputs that are pending stay so.

        Raises:
            InterruptedTargetError: the run was stopped, and a remote target does not answer.
        """
        return self._start(batch)()

    def _start(self, batch: Batch) -> Callable[[], TargetOutput]:
        """Starts to compute a batch, if it can be ahead; the function waits for the output and returns it."""
        if self._threads:
            ready = torch.cuda.current_stream().record_event() if self.stream else None
            request = self._threads.submit(self._request, batch, ready)
            return lambda: _to_current_stream(*self._wait(request))
        if self.stream:
            # The batch is copied on the draft's stream; waiting also limits the outputs in memory to one step's.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), self.timer.section("target"), self.timer.local():
                computed = self.target.compute_hidden_states(batch), self.stream.record_event()
            return lambda: _to_current_stream(*computed)
        return lambda: self._compute(batch)

    def _compute(self, batch: Batch) -> TargetOutput:
        with self.timer.section("target"), nullcontext() if self.target.collective else self.timer.local():
            return self.target.compute_hidden_states(batch)

    def _request(self, batch: Batch, ready: Any) -> tuple[TargetOutput, torch.cuda.Event | None]:
        """A remote target's output; copies to and from the device do not wait for pending work of the draft."""
        if self.stream is None:
            return self.target.compute_hidden_states(batch), None
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            return self.target.compute_hidden_states(batch), self.stream.record_event()

    def _wait(self, request: Future[tuple[TargetOutput, Any]]) -> tuple[TargetOutput, Any]:
        with self.timer.section("target"):  # of a remote target, only the time spent waiting
            while not wait([request], POLL_SECONDS).done:
                if self.stop.is_set() and not wait([request], STOP_SECONDS).done:
                    raise InterruptedTargetError(
                        "interrupted while no target server answered: this step is lost; resume with resume=auto"
                    )
            return request.result()

    def close(self) -> None:
        """Abandons pending requests without waiting: the server may not answer."""
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _to_current_stream(output: TargetOutput, done: torch.cuda.Event | None) -> TargetOutput:
    """Makes ``output``, computed on another stream, usable on the current one."""
    if done is not None:
        current = torch.cuda.current_stream()
        current.wait_event(done)
        for states in (output.aux_hidden_states, output.last_hidden_state):
            states.record_stream(current)
    return output
