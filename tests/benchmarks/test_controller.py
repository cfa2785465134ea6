"""Workers that run in turn, their measurements, and the table."""

import os
import sys

import pytest
import torch

from benchmarks.training_step.controller import Pass, Worker, interleave
from benchmarks.training_step.implementations.base import Implementation
from benchmarks.training_step.table import figures, multiples
from benchmarks.training_step.worker import Memory, measured, most_alive
from nemo_speculative.utils.errors import UserError

TRIVIAL = """
import json, sys
name, diary = sys.argv[1:]
print(json.dumps({"name": name}), flush=True)
for n, _ in enumerate(sys.stdin):
    with open(diary, "a") as file: file.write(name)
    print(json.dumps({"seconds": n + 1, "cpu_seconds": 2 * n, "added_mb": 5.0, "loss": None}), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts workers, and ends all of them after the test."""
    started = []

    def start(name, code=TRIVIAL):
        command = [sys.executable, "-c", code, name, str(tmp_path / "diary")]
        worker = Worker(name, command, tmp_path / f"{name}.log", os.environ)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.__exit__(None)


def test_every_round_measures_all_and_starts_with_another(start, tmp_path):
    workers, rounds_done = [start("a"), start("b")], []
    for worker in workers:
        worker.wait_until_ready()
    assert [worker.ready["name"] for worker in workers] == ["a", "b"]
    rounds = interleave(workers, 3, lambda: rounds_done.append(1))
    assert (tmp_path / "diary").read_text() == "abbaab"
    assert len(rounds_done) == 3
    assert [r["a"].seconds for r in rounds] == [1, 2, 3]
    assert rounds[2]["b"] == Pass(seconds=3, cpu_seconds=4, added_mb=5.0, loss=None)


def test_a_worker_ends_by_itself_unless_something_failed(start, tmp_path):
    slow_to_end = TRIVIAL + "\nimport time; time.sleep(0.5); open(diary, 'a').write('ended')"
    with pytest.raises(UserError), start("failed", slow_to_end) as worker:
        worker.wait_until_ready()
        raise UserError("another one failed")
    assert not (tmp_path / "diary").exists()
    with start("well", slow_to_end) as worker:
        worker.wait_until_ready()
    assert (tmp_path / "diary").read_text() == "ended"


@pytest.mark.parametrize(
    "code, said",
    [
        ("import sys; sys.exit('no such\\npackage')", "a: its process ended with status 1: package"),
        ("import os; os._exit(3)", "a: its process ended with status 3: no message"),
    ],
)
def test_a_worker_that_cannot_start_is_quoted(start, code, said):
    with pytest.raises(UserError) as error:
        start("a", code).wait_until_ready()
    assert str(error.value) == said


def test_an_error_names_the_worker_that_ended(start):
    worker = start("a", TRIVIAL.replace("for n,", "sys.exit('out of memory')\nfor n,"))
    worker.wait_until_ready()
    worker.process.wait()
    with pytest.raises(UserError, match="a: its process ended with status 1: out of memory"):
        worker.measure()


class Hungry(Implementation):
    """Allocates 40 MB for the duration of a step."""

    def __init__(self):
        super().__init__()
        self.batches = [0.5, 0.25]

    def step(self, batch):
        torch.ones(10_000_000).sum()
        return batch


def test_memory_is_the_peak_of_the_steps():
    torch.ones(25_000_000).sum()  # 100 MB before it: no part of what training adds
    memory = Memory()
    assert memory.added_mb() < 5
    found = measured(Hungry())
    assert found["loss"] == 0.5
    assert found["cpu_seconds"] > 0 and found["seconds"] > 0
    assert 38 < memory.added_mb() < 60


def rounds_of(**seconds):
    """Rounds with the given seconds of each implementation, which adds as many MB as its first round has seconds."""
    return [
        {name: Pass(s[n], 2 * s[n], 10 * s[0], None) for name, s in seconds.items()}
        for n in range(len(next(iter(seconds.values()))))
    ]


def test_the_table_gives_medians_spreads_and_paired_ratios():
    rounds = rounds_of(ours=[1.0, 2.0, 4.0], peer=[2.0, 8.0, 4.0])
    _, ours, peer = figures(rounds, ["ours", "peer"], "peer", num_tokens=80).splitlines()
    assert ours.split() == ["ours", "40", "(20", "to", "80)", "4.00", "10", "0.50"]
    assert peer.split() == ["peer", "20", "(10", "to", "40)", "8.00", "20", "1.00"]
    head, ours, peer = multiples(rounds, ["ours", "peer"], ["peer", "ours"]).splitlines()
    assert head.split()[-2:] == ["peer", "ours"]
    # the median of 2, 4 and 1, not the ratio of the medians
    assert ours.split() == ["ours", "2.00", "(1.00", "to", "4.00)", "1.00", "(1.00", "to", "1.00)"]
    assert peer.split() == ["peer", "1.00", "(1.00", "to", "1.00)", "0.50", "(0.25", "to", "1.00)"]


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ([(100, 10), (200, 20), (100, -10), (300, 15)], 35),
        ([(100, 10), (100, 10), (200, 5)], 15),  # another thread freed the first
        ([(100, 10), (120, 10), (95, 30)], 30),  # and both of these
        ([(100, 10), (110, 5), (115, 5)], 20),  # neighbours stay
        ([(500, -40), (100, 10)], 0),  # made before
    ],
)
def test_a_block_counts_as_freed_when_its_memory_is_allocated_again(changes, most):
    assert most_alive(changes) == most
