"""Signs of life between the ranks of a job: which one is gone, and which one the others wait for.

A thread of each rank writes where it stands into the store through which the job was started; the first rank's thread
also reads what the others write.  Nothing of it is on the way of a training step.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch.distributed as dist

from nemo_speculative.distributed.collectives import end_in_own_time
from nemo_speculative.utils.errors import PeerLostError

BEAT_SECONDS = 2.0
STALL_SECONDS = 60.0
"""A rank that has not moved for so long, while others have, is named."""
BEATS_MISSED = 2.5
"""After so many a rank is taken for gone."""


class Place(NamedTuple):
    """Where a rank stands."""

    turns: int
    """Counts the parts of its steps: every rank goes through the same."""
    step: int
    part: str
    """Empty between two parts."""

    def __str__(self) -> str:
        return f"at step {self.step}" + (f" ({self.part})" if self.part else "")


@dataclass(frozen=True)
class Sign:
    """What a rank writes."""

    beat: int
    host: str
    place: Place
    left: bool = False
    """It has ended by itself."""

    @classmethod
    def read(cls, text: bytes) -> "Sign":
        values = json.loads(text)
        return cls(**values | {"place": Place(*values["place"])})


@dataclass
class Watch:
    """Says which rank the others wait for, once each time; of a clock that is given to it."""

    seconds: float = STALL_SECONDS
    _moved: dict[int, tuple[Sign, float, float]] = field(default_factory=dict)
    """Of each rank its last sign, and when its place and its beat were last seen to change."""
    _told: dict[int, Place] = field(default_factory=dict)

    def see(self, signs: dict[int, Sign], now: float) -> list[str]:
        """What is to be said after ``signs`` were read at ``now`` seconds."""
        for rank, sign in signs.items():
            before, moved, beaten = self._moved.get(rank, (None, now, now))
            place_is_new = before is None or before.place != sign.place
            beat_is_new = before is None or before.beat != sign.beat
            self._moved[rank] = sign, now if place_is_new else moved, now if beat_is_new else beaten
        furthest = max((sign.place for sign in signs.values()), default=None)
        return [line for rank in sorted(signs) if (line := self._stalled(rank, furthest, now))]

    def _stalled(self, rank: int, furthest: Place | None, now: float) -> str | None:
        sign, moved, beaten = self._moved[rank]
        silent, behind = now - beaten > self.seconds, now - moved > self.seconds and sign.place != furthest
        if sign.left or self._told.get(rank) == sign.place or not (silent or behind):
            return None
        self._told[rank] = sign.place
        if silent:
            return f"rank {rank} (host {sign.host}) has not been heard for {now - beaten:.0f} s, it was {sign.place}"
        return f"rank {rank} (host {sign.host}) is {sign.place} for {now - moved:.0f} s, the others wait {furthest}"


class Heartbeat:
    """This rank's signs of life, and what the others' tell.

    Args:
        say: is given lines on the first rank: which rank the others wait for.
    """

    def __init__(self, say: Callable[[str], None], beat: float = BEAT_SECONDS, stall: float = STALL_SECONDS):
        self.rank, self.ranks, self._say, self._seconds = dist.get_rank(), dist.get_world_size(), say, beat
        self.where: Callable[[], Place] = lambda: Place(-1, 0, "setting up")
        """Asked by the thread at each beat."""
        self._beats, self._watch, self._end = 0, Watch(stall), threading.Event()
        if self.ranks > 1:
            # A connection of its own: one that waits for another rank holds the other.
            self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the job
            while not self._end.wait(self._seconds if self._beats else 0):
                self._write()
                if self.rank == 0:
                    for line in self._watch.see(self._read(), time.monotonic()):
                        self._say(line)

    def _write(self, left: bool = False) -> None:
        self._beats += 1
        sign = Sign(self._beats, socket.gethostname(), self.where(), left)
        self._store.set(str(self.rank), json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        there = [rank for rank in range(self.ranks) if self._store.check([str(rank)])]
        return {rank: Sign.read(self._store.get(str(rank))) for rank in there}

    def lost(self) -> str:
        """Who is gone, after an exchange with the others has failed; takes a few beats to find out."""
        try:
            before = self._read()
            time.sleep(BEATS_MISSED * self._seconds)
            after = self._read()
        except RuntimeError:
            return "rank 0, which held the store of the job, is gone"
        others = {rank: sign for rank, sign in after.items() if rank != self.rank}
        left = [f"rank {rank} (host {sign.host}) has ended" for rank, sign in others.items() if sign.left]
        gone = [
            f"rank {rank} (host {sign.host}, {sign.place}) is gone or stopped"
            for rank, sign in others.items()
            if not sign.left and rank in before and before[rank].beat == sign.beat
        ]
        waited = [f"rank {rank} (host {sign.host}, {sign.place}) does not answer" for rank, sign in others.items()]
        return ", ".join(gone or left or waited)

    def close(self) -> None:
        """This rank ends by itself."""
        if self.ranks > 1 and not self._end.is_set():
            self._end.set()
            self._thread.join(self._seconds)
            with contextlib.suppress(RuntimeError):
                self._write(left=True)


@contextlib.contextmanager
def lost_ranks_named(heartbeat: Heartbeat) -> Iterator[None]:
    """One line for what torch says when another rank has gone away or does not answer.

    Raises:
        LostError: an exchange with another rank failed inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not of_an_exchange(error):
            raise
        end_in_own_time()
        raise PeerLostError(
            f"{heartbeat.lost()}; no rank can go on without it: see what it or its host said last (most often it ran "
            "out of memory, or lost its machine), and start all ranks again with resume=auto"
        ) from error


def of_an_exchange(error: RuntimeError) -> bool:
    """Whether ``error`` is torch's word for ranks that did not reach each other."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
