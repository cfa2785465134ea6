"""The processes of a job: what one does for all, and what each tells the others."""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from nemo_speculative.utils.errors import PeerLostError, UserError

T = TypeVar("T")
FIRST_RANK_TIMEOUT = timedelta(hours=2)
"""How long the others wait while the first rank makes a target or its answers, measures a draft, or writes."""

_waiting: dist.ProcessGroup | None = None
"""The group in which they wait; None: the default one, whose timeout is another while a draft is trained."""

_limited: list[dist.ProcessGroup] = []
"""Those beside the default one and the mesh's in which nobody waits for what the first rank does alone."""


def started() -> int:
    """How many processes a launcher has started; known before they have met.

    Raises:
        UserError: the environment does not say it in a number.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or not int(said):
        raise UserError(f"WORLD_SIZE={said}: expected how many processes there are; set it so, or unset it")
    return int(said)


def is_first() -> bool:
    """Whether this is the first of them."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def waiting_group() -> Iterator[None]:
    """Within, :func:`on_first_rank` waits in a group of its own."""
    global _waiting
    _waiting = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    try:
        yield
    finally:
        _waiting = None
        _limited.clear()


def limited(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """``group``, remembered until the end of :func:`waiting_group`: a training limits the waits in it, too."""
    _limited.append(group)
    return group


def limited_groups() -> list[dist.ProcessGroup]:
    """All that are :func:`limited`."""
    return list(_limited)


def on_first_rank(make: Callable[[], T]) -> T | None:
    """``make()`` on rank 0 while the others wait; None on them.  An error of rank 0 ends all of them."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = make()
        except BaseException as error:
            failure = error
            end_in_own_time()
    failed = torch.tensor([failure is not None])
    dist.broadcast(failed, src=0, group=_waiting)
    if failure is not None:
        raise failure
    if failed.item():
        raise PeerLostError("rank 0 failed; its message says why")
    return result


def end_in_own_time() -> None:
    """Of a rank that has to say why it ends: its launcher ends all when one has ended, and that may be another."""
    if dist.get_world_size() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def first_rank_first(make: Callable[[], T]) -> T:
    """``make()`` on rank 0, then on the others, which find on disk what rank 0 left there."""
    result = on_first_rank(make)
    return make() if dist.get_rank() else result  # type: ignore[return-value]


def gathered(own: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """What every rank of ``group`` has, int64 and on the host; a rank's may be of another size than this one's."""
    sizes = [torch.empty(own.ndim, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor(own.shape), group=group)
    shapes = [size.tolist() for size in sizes]
    longest = max(math.prod(shape) for shape in shapes)
    received = [torch.empty(longest, dtype=torch.int64) for _ in shapes]
    dist.all_gather(received, pad(own.cpu().flatten(), (0, longest - own.numel())), group=group)
    return [x[: math.prod(shape)].view(shape) for x, shape in zip(received, shapes, strict=True)]
