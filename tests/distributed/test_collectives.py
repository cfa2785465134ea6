"""What the first rank does for all, and how all end when it fails."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.collectives import on_first_rank
from nemo_speculative.utils.errors import PeerLostError, UserError
from tests.training.ranks import on_ranks


def refused():
    raise UserError("the checkpoint is damaged")


def ended_by_the_other():
    """The second rank ends the first, as their launcher would, while that is about to say why."""
    first = torch.tensor([os.getpid()])
    dist.broadcast(first, src=0)
    with pytest.raises(UserError) as ended:
        on_first_rank(refused)
    if dist.get_rank():
        os.kill(int(first), signal.SIGTERM)
    else:
        time.sleep(0.5)
    return [type(ended.value).__name__, str(ended.value)]


def test_the_first_rank_says_why_it_fails_though_the_others_end_before_it():
    assert on_ranks(2, ended_by_the_other) == [
        ["UserError", "the checkpoint is damaged"],
        [PeerLostError.__name__, "rank 0 failed; its message says why"],
    ]


def test_a_process_alone_still_heeds_sigterm(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="damaged"):
        on_first_rank(refused)
    assert signal.getsignal(signal.SIGTERM) == before
