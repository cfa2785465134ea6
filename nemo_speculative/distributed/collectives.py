"""Helpers over torch.distributed: work that rank 0 does for all, and gathering tensors of different sizes."""

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
"""Wait limit while rank 0 makes a target or its answers, measures a draft, or writes."""

_first_rank_group: dist.ProcessGroup | None = None
"""Group in which ranks wait for rank 0; None: the default group, whose timeout is shorter while a draft trains."""

_registered_groups: list[dist.ProcessGroup] = []
"""Groups, besides the default one and the mesh's, whose timeout a training sets."""


def num_ranks() -> int:
    """Number of processes that the launcher started; valid before the process group exists.

    Raises:
        UserError: WORLD_SIZE is not a positive number.
    """
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or not int(value):
        raise UserError(f"WORLD_SIZE={value}: expected the number of processes; set it to that, or unset it")
    return int(value)


def is_first_rank() -> bool:
    """Whether this process is rank 0; valid before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def first_rank_waiting_group() -> Iterator[None]:
    """Gives :func:`on_first_rank` a process group of its own, with :data:`FIRST_RANK_TIMEOUT`."""
    global _first_rank_group
    _first_rank_group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    try:
        yield
    finally:
        _first_rank_group = None
        _registered_groups.clear()


def register_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Registers ``group`` among those whose timeout a training sets, until the process group ends; returns it."""
    _registered_groups.append(group)
    return group


def registered_groups() -> list[dist.ProcessGroup]:
    """The groups passed to :func:`register_group`."""
    return list(_registered_groups)


def on_first_rank(function: Callable[[], T]) -> T | None:
    """Calls ``function`` on rank 0 while the others wait, where the result is None.  An error on rank 0 ends all."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except BaseException as error:
            failure = error
            ignore_sigterm()
    failed = torch.tensor([failure is not None])
    dist.broadcast(failed, src=0, group=_first_rank_group)
    if failure is not None:
        raise failure
    if failed.item():
        raise PeerLostError("rank 0 failed; its message says why")
    return result


def first_rank_first(function: Callable[[], T]) -> T:
    """Calls ``function`` on rank 0, then on the others, which read from disk what rank 0 wrote there."""
    result = on_first_rank(function)
    return function() if dist.get_rank() else result  # type: ignore[return-value]


def ignore_sigterm() -> None:
    """Lets a failing rank print its error: the launcher sends SIGTERM to all ranks as soon as any one has ended."""
    if dist.get_world_size() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def all_gather_ragged(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """The int64 ``tensor`` of every rank of ``group``, on the host; sizes may differ, the number of dimensions not."""
    shapes_by_rank = [torch.empty(tensor.ndim, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes_by_rank, torch.tensor(tensor.shape), group=group)
    shapes = [shape.tolist() for shape in shapes_by_rank]
    longest = max(math.prod(shape) for shape in shapes)
    received = [torch.empty(longest, dtype=torch.int64) for _ in shapes]
    dist.all_gather(received, pad(tensor.cpu().flatten(), (0, longest - tensor.numel())), group=group)
    return [x[: math.prod(shape)].view(shape) for x, shape in zip(received, shapes, strict=True)]
