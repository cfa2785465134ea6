"""Health of the ranks of a job: lost ranks, stalled ranks, and ranks that compute more slowly than the others.

A thread of each rank writes its progress into the store through which the job was started; rank 0's thread also reads
the others'.  No training step waits for any of it.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_speculative.distributed.parallelism import ignore_sigterm
from nemo_speculative.utils.errors import PeerLostError

BEAT_SECONDS, STALL_SECONDS, MISSED_BEATS = 2.0, 60.0, 2.5
"""A rank without progress for this long, while others have some, is reported; one that misses these beats is gone."""
COMPARED_STEPS, SLOW_RATIO, SLOW_COMPARISONS = 10, 1.5, 3
"""Fewest steps of a comparison, multiple of the median from which a rank is slow in it, and slow comparisons in a row
after which it is reported."""


class Progress(NamedTuple):
    """A rank's progress through its steps; ordered, so that the furthest rank has the largest."""

    sections: int
    """Sections of steps entered or left so far: every rank passes through the same ones."""
    step: int
    section: str
    """Name of the section; empty between two sections."""

    def __str__(self) -> str:
        return f"at step {self.step}" + (f" ({self.section})" if self.section else "")


class Beat(NamedTuple):
    """One heartbeat of a rank, as written to the store."""

    number: int
    host: str
    progress: Progress
    ended: bool = False
    """Whether the rank has ended on its own."""

    @classmethod
    def from_json(cls, text: bytes) -> "Beat":
        number, host, progress, ended = json.loads(text)
        return cls(number, host, Progress(*progress), ended)


class StallDetector:
    """Reports the ranks that the others wait for, once per stall.  It has no clock: the caller passes the time."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._latest: dict[int, tuple[Beat, float, float]] = {}
        """The latest beat of each rank, and when its progress and its beat number last changed."""
        self._reported: dict[int, Progress] = {}

    def update(self, beats: dict[int, Beat], now: float) -> list[str]:
        """Lines to print after ``beats`` were read at ``now`` seconds."""
        for rank, beat in beats.items():
            before, moved, heard = self._latest.get(rank, (beat, now, now))
            moved = moved if before.progress == beat.progress else now
            self._latest[rank] = beat, moved, heard if before.number == beat.number else now
        furthest = max((beat.progress for beat in beats.values()), default=None)
        return [line for rank in sorted(beats) if (line := self._stall_of(rank, furthest, now))]

    def _stall_of(self, rank: int, furthest: Progress | None, now: float) -> str | None:
        beat, moved, heard = self._latest[rank]
        silent, stalled = now - heard > self.seconds, now - moved > self.seconds and beat.progress != furthest
        if beat.ended or self._reported.get(rank) == beat.progress or not (silent or stalled):
            return None
        self._reported[rank] = beat.progress
        who = f"rank {rank} (host {beat.host}) has"
        if silent:
            return f"{who} not been heard for {now - heard:.0f} s, it was {beat.progress}"
        return f"{who} been {beat.progress} for {now - moved:.0f} s, the others wait {furthest}"


class Heartbeat:
    """Publishes this rank's progress and watches the others'.

    Args:
        log: called on rank 0 with lines that name the rank the others wait for.
    """

    def __init__(self, log: Callable[[str], None], beat: float = BEAT_SECONDS, stall: float = STALL_SECONDS):
        self.rank, self.ranks, self._log, self._seconds = dist.get_rank(), dist.get_world_size(), log, beat
        self.get_progress: Callable[[], Progress] = lambda: Progress(-1, 0, "setting up")
        """Called by the thread at each beat."""
        self._count, self._detector, self._end = 0, StallDetector(stall), threading.Event()
        if self.ranks > 1:
            # A connection of its own: a collective that waits for another rank blocks the default one.
            self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is the job
            while not self._end.wait(self._seconds if self._count else 0):
                self._write()
                if self.rank == 0:
                    for line in self._detector.update(self._read(), time.monotonic()):
                        self._log(line)

    def _write(self, ended: bool = False) -> None:
        self._count += 1
        beat = Beat(self._count, socket.gethostname(), self.get_progress(), ended)
        self._store.set(str(self.rank), json.dumps(beat))

    def _read(self) -> dict[int, Beat]:
        present = [rank for rank in range(self.ranks) if self._store.check([str(rank)])]
        return {rank: Beat.from_json(self._store.get(str(rank))) for rank in present}

    def describe_lost(self) -> str:
        """Names the ranks that are gone, after a collective has failed; takes a few beats."""
        try:
            before = self._read()
            time.sleep(MISSED_BEATS * self._seconds)
            after = {rank: beat for rank, beat in self._read().items() if rank != self.rank}
        except RuntimeError:
            return "rank 0, which held the store of the job, is gone"
        gone, ended, silent = [], [], []
        for rank, beat in after.items():
            if beat.ended:
                ended.append(f"rank {rank} (host {beat.host}) has ended")
            elif rank in before and before[rank].number == beat.number:
                gone.append(f"rank {rank} (host {beat.host}, {beat.progress}) is gone or stopped")
            silent.append(f"rank {rank} (host {beat.host}, {beat.progress}) does not answer")
        return ", ".join(gone or ended or silent)

    def close(self) -> None:
        """Announces that this rank ends on its own."""
        if self.ranks > 1 and not self._end.is_set():
            self._end.set()
            self._thread.join(self._seconds)
            with contextlib.suppress(RuntimeError):
                self._write(ended=True)


@contextlib.contextmanager
def report_lost_ranks(heartbeat: Heartbeat) -> Iterator[None]:
    """Turns torch's error about a rank that is gone or does not answer into a PeerLostError that names it."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective_failure(error):
            raise
        ignore_sigterm()
        raise PeerLostError(
            f"{heartbeat.describe_lost()}; no rank can continue without it: see what it or its host printed last (most "
            "often it ran out of memory, or lost its machine), and start all ranks again with resume=auto"
        ) from error


def is_collective_failure(error: RuntimeError) -> bool:
    """Whether torch raised ``error`` because ranks did not reach each other."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


class StragglerDetector:
    """Finds ranks that compute more slowly than the others.

    All ranks end a step together, so its time does not tell them apart: each measures what it computes without waiting
    for another, which is the target's forward pass where the rank holds the whole target, and the draft's loss.  Rows
    have equal lengths but not equally many supervised tokens, so several steps are compared at once, several times.

    Args:
        log: called with a line about each rank that has been slow for some time, once until it no longer is.
    """

    def __init__(self, log: Callable[[str], None]):
        self._log, self._seconds = log, 0.0
        self._since: int | None = None
        self._slow_in_a_row = torch.zeros(dist.get_world_size(), dtype=torch.int64)

    def compare(self, step: int, seconds: float) -> dict[str, float]:
        """Metrics for ``step``, once there are enough steps to compare.  Every rank calls it at the same steps.

        Args:
            seconds: rank-local computation since the last call; ignored at the first one, as first steps take longer.
        """
        if self._since is None:
            self._since = step
            return {}
        self._seconds, steps = self._seconds + seconds, step - self._since
        if dist.get_world_size() == 1 or steps < COMPARED_STEPS:
            return {}
        seconds_by_rank = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        seconds_by_rank[dist.get_rank()] = self._seconds
        dist.all_reduce(seconds_by_rank)
        ratios = seconds_by_rank / seconds_by_rank.median().clamp(min=1e-9)
        self._slow_in_a_row = torch.where(ratios > SLOW_RATIO, self._slow_in_a_row + 1, 0)
        for rank in (self._slow_in_a_row == SLOW_COMPARISONS).nonzero().flatten().tolist():
            self._log(
                f"rank {rank} (host {_host_of(rank)}) computes {ratios[rank]:.1f} times as long as most, "
                f"{SLOW_COMPARISONS} times {steps} steps in a row: the others wait for it in every step; "
                "look at its host"
            )
        self._seconds, self._since = 0.0, step
        return {"perf/slowest_rank": int(ratios.argmax()), "perf/slowest_over_median": float(ratios.max())}


def _host_of(rank: int) -> str:
    """Host name of ``rank``, which broadcasts it to all."""
    name = list(socket.gethostname().encode()[:255])
    buffer = torch.tensor(name + [0] * (255 - len(name)), dtype=torch.uint8)
    dist.broadcast(buffer, src=rank)
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")
