"""Which rank computes more slowly than the others.

Ranks end every step together, so its time tells none of them apart: each counts what it computes without waiting for
another, the target's forward and the draft's loss.  The work is about the same on all of them: rows are equally long.
"""

import socket
from collections.abc import Callable
from statistics import median_low

import torch
import torch.distributed as dist

SLOWER = 1.5
"""Times the median of the ranks."""
IN_A_ROW = 3
"""So often it must be the same rank: rows differ in how much of them is supervised, and hosts have bad moments."""
HOST_BYTES = 255


class Pace:
    """Compares the ranks.

    Args:
        say: is given a line about a rank that has been slow for some time, once until it no longer is.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._slow, self._times = 0, 0

    def compare(self, seconds: float) -> dict[str, float]:
        """What to log.  Every rank calls it.

        Args:
            seconds: what this rank has computed by itself since the last time.
        """
        if dist.get_world_size() == 1:
            return {}
        of_ranks = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        of_ranks[dist.get_rank()] = seconds
        dist.all_reduce(of_ranks)
        slowest = int(of_ranks.argmax())
        ratio = float(of_ranks[slowest]) / max(median_low(of_ranks.tolist()), 1e-9)
        self._note(slowest, ratio)
        return {"perf/slowest_rank": slowest, "perf/slowest_over_median": ratio}

    def _note(self, slowest: int, ratio: float) -> None:
        again = ratio > SLOWER and (slowest == self._slow or not self._times)
        self._slow, self._times = slowest, self._times + 1 if again else int(ratio > SLOWER)
        if self._times == IN_A_ROW:
            self._say(
                f"rank {slowest} (host {_host_of(slowest)}) computes {ratio:.1f} times as long as most, {IN_A_ROW} log "
                "lines in a row: the others wait for it in every step; look at its host"
            )


def _host_of(rank: int) -> str:
    """Told by ``rank`` to all."""
    name = socket.gethostname().encode()[:HOST_BYTES]
    told = torch.zeros(HOST_BYTES, dtype=torch.uint8)
    told[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    dist.broadcast(told, src=rank)
    return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")
