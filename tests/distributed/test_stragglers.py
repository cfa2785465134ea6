"""The rank that computes more slowly than the others is named, from what each of them computes by itself."""

import time

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.stragglers import IN_A_ROW, STEPS, StragglerDetector
from nemo_speculative.training.step_timer import StepTimer
from tests.training.ranks import on_ranks

ONE_SLOW = [1.0, 1.1, 3.0, 1.0]
ANOTHER_SLOW = [3.0, 1.1, 1.0, 1.0]
BOTH_SLOW, OTHERWISE = [1.0, 2.9, 3.0, 1.0], [1.0, 3.0, 2.9, 1.0]
EVEN = [1.0, 1.2, 1.4, 1.0]
LAPS: dict[str, tuple[list[list[float]], list[int]]] = {
    "slow": ([EVEN, *[ONE_SLOW] * IN_A_ROW], [2]),
    "slow for long": ([ONE_SLOW] * (IN_A_ROW + 4), [2]),
    "slow again": ([*[ONE_SLOW] * IN_A_ROW, EVEN, *[ONE_SLOW] * IN_A_ROW], [2, 2]),
    "two of a host": ([BOTH_SLOW, OTHERWISE] * 4, [1, 2]),
    "another for a moment": ([*[ONE_SLOW] * IN_A_ROW, [9.0, 1.0, 3.0, 1.0], *[ONE_SLOW] * IN_A_ROW], [2]),
    "one after the other": ([*[ONE_SLOW] * (IN_A_ROW - 1), *[ANOTHER_SLOW] * IN_A_ROW], [0]),
    "a bad moment": ([*[ONE_SLOW] * (IN_A_ROW - 1), EVEN, *[ONE_SLOW] * (IN_A_ROW - 1)], []),
    "even": ([EVEN] * 9, []),
    "nothing counted": ([[0.0] * 4] * 9, []),
}
"""Seconds of each of four ranks, one comparison after another, and which ranks are named."""


def said():
    """On every rank: what is said of each case, and the figures of its last comparison."""
    found = {}
    for name, (laps, _) in LAPS.items():
        lines: list[str] = []
        pace, step = StragglerDetector(lines.append), 1
        assert pace.compare(step, 9.0 * dist.get_rank()) == {}, "first steps are not compared"
        for seconds in laps:
            own = seconds[dist.get_rank()]
            assert pace.compare(step + 4, 0.3 * own) == {}, "too few steps to compare"
            step += STEPS
            figures = pace.compare(step, 0.7 * own)
        found[name] = lines, figures
    return found


@pytest.fixture(scope="module")
def found():
    return on_ranks(4, said)


@pytest.mark.parametrize("name", LAPS)
def test_a_rank_is_named_once_it_has_been_slow_for_some_time(found, name):
    for of_rank in found:
        lines, _ = of_rank[name]
        assert [int(line.split()[1]) for line in lines] == LAPS[name][1]
        assert all("(host " in line and "(host )" not in line and "\0" not in line for line in lines)


def test_the_figures_are_those_of_all_ranks(found):
    for of_rank in found:
        _, figures = of_rank["slow"]
        assert figures["perf/slowest_rank"] == 2
        assert figures["perf/slowest_over_median"] == pytest.approx(3.0)


def test_only_what_is_computed_alone_is_compared_and_it_is_no_part_of_its_own():
    clock = StepTimer(torch.device("cpu"))
    with clock.part("target"):
        with clock.alone():
            time.sleep(0.02)
        time.sleep(0.05)
    lap = clock.lap()
    assert set(lap.shares) == {"target"}
    assert 0.02 <= lap.alone <= lap.shares["target"] * lap.wall - 0.05
    assert clock.lap().alone == 0
