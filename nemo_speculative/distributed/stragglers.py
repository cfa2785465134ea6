"""Which ranks compute more slowly than the others.

Ranks end every step together, so its time tells none of them apart: each counts what it computes without waiting for
another, the target's forward where it has the target whole, and the draft's loss.  Rows are equally long but not
equally supervised, so several steps are compared at once, and several times.  (Where ranks hold the target together
they embed the draft's tokens together, too, and wait there for whoever was slow before it in the loss.)
"""

import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

SLOWER = 1.5
"""Times the median of the ranks."""
STEPS = 10
"""At least so many are compared at once."""
IN_A_ROW = 3
"""So often a rank must have been slow to be named."""
HOST_BYTES = 255


class StragglerDetector:
    """Compares the ranks.

    Args:
        say: is given a line about each rank that has been slow for some time, once until it no longer is.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._seconds = 0.0
        self._since: int | None = None
        self._times = torch.zeros(dist.get_world_size(), dtype=torch.int64)

    def compare(self, step: int, seconds: float) -> dict[str, float]:
        """What to log at ``step``, once there are enough steps to compare.  Every rank calls it at the same ones.

        Args:
            seconds: what this rank has computed by itself since the last call; of the first one it is not looked at,
                as first steps take longer.
        """
        if self._since is None:
            self._since = step
            return {}
        self._seconds, steps = self._seconds + seconds, step - self._since
        if dist.get_world_size() == 1 or steps < STEPS:
            return {}
        of_ranks = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        of_ranks[dist.get_rank()] = self._seconds
        dist.all_reduce(of_ranks)
        ratios = of_ranks / of_ranks.median().clamp(min=1e-9)
        self._name(ratios, steps)
        self._seconds, self._since = 0.0, step
        return {"perf/slowest_rank": int(ratios.argmax()), "perf/slowest_over_median": float(ratios.max())}

    def _name(self, ratios: torch.Tensor, steps: int) -> None:
        self._times = torch.where(ratios > SLOWER, self._times + 1, 0)
        for rank in (self._times == IN_A_ROW).nonzero().flatten().tolist():
            self._say(
                f"rank {rank} (host {_host_of(rank)}) computes {ratios[rank]:.1f} times as long as most, "
                f"{IN_A_ROW} times {steps} steps in a row: the others wait for it in every step; look at its host"
            )


def _host_of(rank: int) -> str:
    """Told by ``rank`` to all."""
    name = socket.gethostname().encode()[:HOST_BYTES]
    told = torch.zeros(HOST_BYTES, dtype=torch.uint8)
    told[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    dist.broadcast(told, src=rank)
    return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")
