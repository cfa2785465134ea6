"""What a step needs, ready before it starts: rows scheduled on the host, sent to the device, read by the target.

A thread packs and schedules the next global batch while this one trains.  On CUDA the target reads the next micro-batch
on a stream of its own, beside the draft's work on this one, unless ranks compute it together; a target elsewhere is
asked ahead in threads.
"""

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from nemo_speculative.algorithms.common.objective import Objective
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.loader import PackedLoader
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.training.step_timer import StepTimer
from nemo_speculative.utils.errors import UserError, describe_error

LOOK_SECONDS = 0.2
"""How often who waits for a target elsewhere looks whether to stop."""
STOP_SECONDS = 10.0
"""How long an answer is waited for after that: one that comes lets the step end, and be saved."""


class Interrupted(UserError):
    """Asked to stop while the target did not answer."""

    exit_code = 130


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's share of one step."""

    schedules: list[Any]
    """One for each micro-batch."""
    counts: torch.Tensor
    """float64 [T], on the host: their sum."""
    ids: tuple[str, ...]
    num_tokens: int
    state: dict[str, int]
    """Of the stream behind it: where a run goes on that has trained on it."""
    epoch: int


class BatchPrefetcher:
    """Global batches of ``stream``, one ahead."""

    def __init__(self, stream: PackedLoader, objective: Objective, device: torch.device):
        self.stream, self.objective, self.device = stream, objective, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._next: Future[GlobalBatch] | None = None

    def take(self) -> GlobalBatch:
        """The next global batch; work on the one after it begins."""
        taken = self.peek()
        self._next = self._thread.submit(self._make)
        return taken

    def peek(self) -> GlobalBatch:
        """What :meth:`take` will return."""
        self._next = self._next or self._thread.submit(self._make)
        try:
            return self._next.result()
        except UserError:
            raise
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            raise UserError(
                f"data: the next batch could not be made ({describe_error(error)}, "
                f"{Path(last.filename).name}:{last.lineno}); "
                "if the data changed on the disk, put it back, and start again with resume=auto"
            ) from error

    def _make(self) -> GlobalBatch:
        batches = self.stream.next_global_batch()
        schedules = [self.objective.schedule(batch, self.device) for batch in batches]
        return GlobalBatch(
            schedules,
            torch.stack([schedule.counts for schedule in schedules]).sum(0),
            tuple(i for batch in batches for i in batch.ids),
            sum(batch.num_tokens for batch in batches),
            self.stream.state_dict(),
            self.stream.epoch,
        )

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown(cancel_futures=True)


T = TypeVar("T")
Wait = Callable[[], TargetOutput]
"""Returns what the target was asked for, once it is there."""


class InTurn:
    """The target asked when its answer is needed."""

    ahead = 0

    def __init__(self, target: Target, clock: StepTimer):
        self.target, self.clock = target, clock

    def start(self, batch: Batch) -> Wait:
        return partial(self._read, batch)

    def _read(self, batch: Batch) -> TargetOutput:
        timed = contextlib.nullcontext if self.target.collective else self.clock.local
        with self.clock.section("target"), timed():
            return self.target.compute_hidden_states(batch)

    def close(self) -> None:
        """Nothing is under way."""


class OnSideStream:
    """The target on a CUDA stream of its own, beside the draft's work."""

    ahead = 1

    def __init__(self, target: Target, clock: StepTimer, device: torch.device):
        self.target, self.clock, self.side = target, clock, torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Wait:
        # The batch arrives on the draft's stream; and no more than one step's outputs wait there.
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side), self.clock.section("target"), self.clock.local():
            return partial(_received, self.target.compute_hidden_states(batch), self.side.record_event())

    def close(self) -> None:
        """Nothing is under way that could not be left."""


class InThreads:
    """A target that only waits for others, asked in threads; the clock counts what is waited for it."""

    def __init__(self, target: Target, clock: StepTimer, device: torch.device, stop: threading.Event):
        self.target, self.clock, self.stop, self.ahead = target, clock, stop, target.requests_ahead
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(max_workers=1 + self.ahead, thread_name_prefix="target")

    def start(self, batch: Batch) -> Wait:
        if self.side is None:
            return partial(self._wait, self._threads.submit(self.target.compute_hidden_states, batch))
        arrived = torch.cuda.current_stream().record_event()
        asked = self._threads.submit(self._read_on, self.side, batch, arrived)
        return lambda: _received(*self._wait(asked))

    def _read_on(self, side: torch.cuda.Stream, batch: Batch, arrived: torch.cuda.Event) -> tuple[TargetOutput, Any]:
        """Its copies to and from the device wait for nothing that the draft's stream still has to do."""
        side.wait_event(arrived)
        with torch.cuda.stream(side):
            return self.target.compute_hidden_states(batch), side.record_event()

    def _wait(self, asked: Future[T]) -> T:
        """
        Raises:
            Interrupted: the run was asked to stop, and there is no answer.
        """
        with self.clock.section("target"):
            while not wait([asked], LOOK_SECONDS).done:
                if self.stop.is_set() and not wait([asked], STOP_SECONDS).done:
                    raise Interrupted(
                        "interrupted while no target server answered: this step is lost; go on with resume=auto"
                    )
            return asked.result()

    def close(self) -> None:
        # Not waited for: it may be a server that does not answer.
        self._threads.shutdown(wait=False, cancel_futures=True)


def _received(supervision: TargetOutput, done: torch.cuda.Event) -> TargetOutput:
    """``supervision``, made on another stream, for the current one."""
    current = torch.cuda.current_stream()
    current.wait_event(done)
    for made in (supervision.aux_hidden_states, supervision.last_hidden_state):
        made.record_stream(current)
    return supervision


class TargetPrefetcher:
    """The target's outputs for one schedule after the other; where it can be, asked for ahead of the draft's work.

    Args:
        stop: set when the run is to end: a target elsewhere that does not answer is then waited for no longer.
    """

    def __init__(self, target: Target, device: torch.device, clock: StepTimer, stop: threading.Event | None = None):
        self.asker = _asker(target, device, clock, stop or threading.Event())
        self._started: deque[Wait] = deque()

    def over(self, schedules: list[Any], coming: Callable[[], list[Any]]) -> Iterator[tuple[Any, TargetOutput]]:
        """Each schedule with its supervision.

        Args:
            coming: the schedules of the next call.
        """
        for n, schedule in enumerate(schedules):
            self._start(schedules[n:], coming)
            yield schedule, self._started.popleft()()

    def _start(self, schedules: list[Any], coming: Callable[[], list[Any]]) -> None:
        """Asks for the first of ``schedules``, and for as many behind it as the target may be ahead."""
        wanted = 1 + self.asker.ahead
        if wanted > len(schedules):
            schedules = schedules + coming()
        for schedule in schedules[len(self._started) : wanted]:
            self._started.append(self.asker.start(schedule.batch))

    def at_once(self, batch: Batch) -> TargetOutput:
        """The target's outputs for a batch out of turn; what was asked for ahead is left as it is."""
        return self.asker.start(batch)()

    def close(self) -> None:
        """Gives up what was asked for ahead."""
        self.asker.close()


def _asker(
    target: Target, device: torch.device, clock: StepTimer, stop: threading.Event
) -> InTurn | OnSideStream | InThreads:
    if target.requests_ahead:
        return InThreads(target, clock, device, stop)
    # What ranks compute together keeps its place among what they exchange for the draft.
    beside = device.type == "cuda" and not target.collective
    return OnSideStream(target, clock, device) if beside else InTurn(target, clock)
