"""Detection of lost, stalled and slow ranks."""

import time

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.health import (
    COMPARED_STEPS,
    SLOW_COMPARISONS,
    Beat,
    Heartbeat,
    Progress,
    StallDetector,
    StragglerDetector,
    is_collective_failure,
)
from nemo_speculative.utils.devices import StepTimer
from tests.training.ranks import on_ranks

BEAT = 0.1


def beats(number, *progress, ended=()):
    return {
        rank: Beat(number, f"h{rank}", Progress(sections, 7, section), rank in ended)
        for rank, (sections, section) in enumerate(progress)
    }


def test_a_stalled_rank_is_reported_once_per_stall():
    detector, ahead, behind = StallDetector(60), (9, "draft"), (8, "target")
    reports = [detector.update(beats(n, ahead, behind, ahead), 10.0 * n) for n in range(12)]
    assert [n for n, lines in enumerate(reports) if lines] == [7]
    assert reports[7] == ["rank 1 (host h1) has been at step 7 (target) for 70 s, the others wait at step 7 (draft)"]
    assert not detector.update(beats(12, ahead, (9, "draft"), ahead), 120.0)
    again = [detector.update(beats(n, (12, ""), (11, "target"), (12, "")), 10.0 * n) for n in range(13, 22)]
    assert [len(lines) for lines in again] == [0] * 7 + [1, 0]


def test_ranks_that_wait_at_the_same_point_are_not_reported():
    """While one decodes, or all compile, their progress is equal."""
    detector = StallDetector(60)
    assert not any(detector.update(beats(n, (4, ""), (4, "")), 10.0 * n) for n in range(50))


def test_a_silent_rank_is_reported_unless_it_has_ended():
    for ended, expected in (((), 1), ((1,), 0)):
        detector, lines = StallDetector(60), []
        for n in range(12):
            silent = beats(0, (4, ""), (4, ""), ended=ended)[1]
            lines += detector.update(beats(n, (4, ""), (4, "")) | {1: silent}, 10.0 * n)
        assert len(lines) == expected and all("rank 1 (host h1) has not been heard for 70 s" in line for line in lines)


def two_heartbeats(second_ends: bool):
    """Rank 1's thread stops as in a killed process; or it ends as a rank does that has printed its error."""
    lines: list[str] = []
    heartbeat = Heartbeat(lines.append, beat=BEAT, stall=4 * BEAT)
    heartbeat.get_progress = lambda: Progress(10 - dist.get_rank(), 3, "draft" if dist.get_rank() == 0 else "target")
    time.sleep(10 * BEAT)
    if dist.get_rank() == 1:
        heartbeat.close() if second_ends else heartbeat._end.set()
        time.sleep(10 * BEAT)
        return None
    time.sleep(2 * BEAT)
    lost = heartbeat.describe_lost()
    heartbeat.close()
    return {"lines": lines, "lost": lost}


def test_rank_0_names_the_stalled_rank_and_the_lost_one():
    result = on_ranks(2, two_heartbeats, False)[0]
    (line,) = [line for line in result["lines"] if "has been at step" in line]
    assert "rank 1" in line and "at step 3 (target)" in line and "wait at step 3 (draft)" in line
    assert result["lost"].startswith("rank 1 (host ") and result["lost"].endswith(
        ", at step 3 (target)) is gone or stopped"
    )


def test_a_rank_that_ended_on_its_own_does_not_count_as_gone():
    assert on_ranks(2, two_heartbeats, True)[0]["lost"].endswith("has ended")


def test_only_errors_of_collectives_count_as_collective_failures():
    assert is_collective_failure(dist.DistBackendError("NCCL error"))
    assert is_collective_failure(RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3"))
    assert not is_collective_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


ONE_SLOW = [1.0, 1.1, 3.0, 1.0]
ANOTHER_SLOW = [3.0, 1.1, 1.0, 1.0]
BOTH_SLOW, BOTH_SLOW_SWAPPED = [1.0, 2.9, 3.0, 1.0], [1.0, 3.0, 2.9, 1.0]
EVEN = [1.0, 1.2, 1.4, 1.0]
COMPARISONS: dict[str, tuple[list[list[float]], list[int]]] = {
    "slow": ([EVEN, *[ONE_SLOW] * SLOW_COMPARISONS], [2]),
    "slow for long": ([ONE_SLOW] * (SLOW_COMPARISONS + 4), [2]),
    "slow again": ([*[ONE_SLOW] * SLOW_COMPARISONS, EVEN, *[ONE_SLOW] * SLOW_COMPARISONS], [2, 2]),
    "two slow ranks": ([BOTH_SLOW, BOTH_SLOW_SWAPPED] * 4, [1, 2]),
    "another slow once": (
        [*[ONE_SLOW] * SLOW_COMPARISONS, [9.0, 1.0, 3.0, 1.0], *[ONE_SLOW] * SLOW_COMPARISONS], [2],
    ),
    "one after the other": ([*[ONE_SLOW] * (SLOW_COMPARISONS - 1), *[ANOTHER_SLOW] * SLOW_COMPARISONS], [0]),
    "not slow often enough": ([*[ONE_SLOW] * (SLOW_COMPARISONS - 1), EVEN, *[ONE_SLOW] * (SLOW_COMPARISONS - 1)], []),
    "even": ([EVEN] * 9, []),
    "nothing measured": ([[0.0] * 4] * 9, []),
}  # fmt: skip
"""Seconds of each of four ranks per comparison, and the ranks that are reported."""


def run_comparisons():
    """On every rank: the lines logged in each case, and the metrics of its last comparison."""
    results = {}
    for name, (comparisons, _) in COMPARISONS.items():
        lines: list[str] = []
        detector, step = StragglerDetector(lines.append), 1
        assert detector.compare(step, 9.0 * dist.get_rank()) == {}, "first steps are not compared"
        for seconds in comparisons:
            own = seconds[dist.get_rank()]
            assert detector.compare(step + 4, 0.3 * own) == {}, "too few steps to compare"
            step += COMPARED_STEPS
            metrics = detector.compare(step, 0.7 * own)
        results[name] = lines, metrics
    return results


@pytest.fixture(scope="module")
def comparisons():
    return on_ranks(4, run_comparisons)


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_rank_is_reported_once_it_has_been_slow_for_some_time(comparisons, name):
    for results in comparisons:
        lines, _ = results[name]
        assert [int(line.split()[1]) for line in lines] == COMPARISONS[name][1]
        assert all("(host " in line and "(host )" not in line and "\0" not in line for line in lines)


def test_straggler_metrics_are_equal_on_all_ranks(comparisons):
    for results in comparisons:
        _, metrics = results["slow"]
        assert metrics["perf/slowest_rank"] == 2
        assert metrics["perf/slowest_over_median"] == pytest.approx(3.0)


def test_local_time_is_part_of_its_section_and_no_section_of_its_own():
    timer = StepTimer(torch.device("cpu"))
    with timer.section("target"):
        with timer.local():
            time.sleep(0.02)
        time.sleep(0.05)
    times = timer.reset()
    assert set(times.shares) == {"target"}
    assert 0.02 <= times.local <= times.shares["target"] * times.wall - 0.05
    assert timer.reset().local == 0
