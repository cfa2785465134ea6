"""Work of rank 0 for all ranks, and the end of all when it fails."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.parallelism import on_first_rank
from nemo_speculative.utils.errors import PeerLostError, UserError
from tests.training.ranks import on_ranks


def fail():
    raise UserError("the checkpoint is damaged")


def terminated_by_the_other():
    """Rank 1 sends SIGTERM to rank 0, as their launcher would, before rank 0 has printed its error."""
    first = torch.tensor([os.getpid()])
    dist.broadcast(first, src=0)
    with pytest.raises(UserError) as ended:
        on_first_rank(fail)
    if dist.get_rank():
        os.kill(int(first), signal.SIGTERM)
    else:
        time.sleep(0.5)
    return [type(ended.value).__name__, str(ended.value)]


def test_rank_0_prints_its_error_though_the_others_end_before_it():
    assert on_ranks(2, terminated_by_the_other) == [
        ["UserError", "the checkpoint is damaged"],
        [PeerLostError.__name__, "rank 0 failed; its message says why"],
    ]


def test_a_single_process_does_not_ignore_sigterm(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="damaged"):
        on_first_rank(fail)
    assert signal.getsignal(signal.SIGTERM) == before
