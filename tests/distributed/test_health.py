"""Which rank is gone, which has ended and which the others wait for."""

import time

import torch.distributed as dist

from nemo_speculative.distributed.health import Heartbeat, Place, Sign, Watch, of_an_exchange
from tests.training.ranks import on_ranks

BEAT = 0.1


def signs(beat, *places, left=()):
    return {n: Sign(beat, f"h{n}", Place(turns, 7, part), n in left) for n, (turns, part) in enumerate(places)}


def test_a_rank_behind_the_others_is_named_once_for_each_time_it_stalls():
    watch, ahead, behind = Watch(60), (9, "draft"), (8, "target")
    seen = [watch.see(signs(beat, ahead, behind, ahead), 10.0 * beat) for beat in range(12)]
    assert [beat for beat, lines in enumerate(seen) if lines] == [7]
    assert seen[7] == ["rank 1 (host h1) is at step 7 (target) for 70 s, the others wait at step 7 (draft)"]
    assert not watch.see(signs(12, ahead, (9, "draft"), ahead), 120.0)
    again = [watch.see(signs(beat, (12, ""), (11, "target"), (12, "")), 10.0 * beat) for beat in range(13, 22)]
    assert [len(lines) for lines in again] == [0] * 7 + [1, 0]


def test_ranks_that_wait_together_are_not_named():
    """As long as one decodes, or all compile, they stand in the same place."""
    watch = Watch(60)
    assert not any(watch.see(signs(beat, (4, ""), (4, "")), 10.0 * beat) for beat in range(50))


def test_a_rank_that_is_not_heard_is_named_wherever_it_stands_and_one_that_has_ended_is_not():
    for left, expected in (((), 1), ((1,), 0)):
        watch, lines = Watch(60), []
        for beat in range(12):
            silent = signs(0, (4, ""), (4, ""), left=left)[1]
            lines += watch.see(signs(beat, (4, ""), (4, "")) | {1: silent}, 10.0 * beat)
        assert len(lines) == expected and all("rank 1 (host h1) has not been heard for 70 s" in line for line in lines)


def two_hearts(second_ends: bool):
    """The second rank's thread stops as that of a killed process does; or it ends as one does that says why."""
    said: list[str] = []
    heart = Heartbeat(said.append, beat=BEAT, stall=4 * BEAT)
    heart.where = lambda: Place(10 - dist.get_rank(), 3, "draft" if dist.get_rank() == 0 else "target")
    time.sleep(10 * BEAT)
    if dist.get_rank() == 1:
        heart.close() if second_ends else heart._end.set()
        time.sleep(10 * BEAT)
        return None
    time.sleep(2 * BEAT)
    lost = heart.lost()
    heart.close()
    return {"said": said, "lost": lost}


def test_the_first_rank_says_whom_it_waits_for_and_who_is_gone():
    found = on_ranks(2, two_hearts, False)[0]
    (line,) = [line for line in found["said"] if "is at step" in line]
    assert "rank 1" in line and "at step 3 (target)" in line and "wait at step 3 (draft)" in line
    assert found["lost"].startswith("rank 1 (host ") and found["lost"].endswith(
        ", at step 3 (target)) is gone or stopped"
    )


def test_a_rank_that_ended_by_itself_is_not_taken_for_gone():
    assert on_ranks(2, two_hearts, True)[0]["lost"].endswith("has ended")


def test_only_what_torch_says_of_other_ranks_is_taken_for_it():
    assert of_an_exchange(dist.DistBackendError("NCCL error"))
    assert of_an_exchange(RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3"))
    assert not of_an_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
