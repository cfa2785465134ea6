"""What a step needs, ready before it starts: rows scheduled on the host, sent to the device, read by the target.

A thread packs and schedules the next global batch while this one trains.  On CUDA the target reads the next micro-batch
on a stream of its own, beside the draft's work on this one.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nemo_speculative.data.stream import RowStream
from nemo_speculative.objectives.base import Objective
from nemo_speculative.targets.base import Supervision, Target
from nemo_speculative.training.clock import Clock


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


class Feed:
    """Global batches of ``stream``, one ahead."""

    def __init__(self, stream: RowStream, objective: Objective, device: torch.device):
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
        return self._next.result()

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


Read = tuple[Supervision, Any]
"""What the target computed, and the CUDA event that says that it is done."""


class TargetAhead:
    """The target's outputs for one schedule after the other; on CUDA one ahead, on a stream of their own."""

    def __init__(self, target: Target, device: torch.device, clock: Clock):
        self.target, self.clock = target, clock
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: Read | None = None

    def over(self, schedules: list[Any], coming: Callable[[], list[Any]]) -> Iterator[tuple[Any, Supervision]]:
        """Each schedule with its supervision.

        Args:
            coming: the schedules of the next call.
        """
        for n, schedule in enumerate(schedules):
            if self.side is None:
                with self.clock.part("target"):
                    supervision = self.target.supervise(schedule.batch)
            else:
                read = self._pending or self._start(schedule)
                self._pending = self._start(schedules[n + 1] if n + 1 < len(schedules) else coming()[0])
                supervision = self._received(*read)
            yield schedule, supervision

    def _start(self, schedule: Any) -> Read:
        assert self.side is not None
        # The batch arrives on the draft's stream; and no more than one step's outputs wait there.
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side), self.clock.part("target"):
            return self.target.supervise(schedule.batch), self.side.record_event()

    def _received(self, supervision: Supervision, done: Any) -> Supervision:
        current = torch.cuda.current_stream()
        current.wait_event(done)
        for made in (supervision.aux, supervision.last_hidden):
            made.record_stream(current)
        return supervision
