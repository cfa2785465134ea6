"""The figures of a cell, by hand and by numpy."""

import numpy as np
import pytest

from nemo_speculative.evaluation.server_benchmark.metrics import acceptance_per_position, figures_of, percentiles
from nemo_speculative.serving.client import Answer


def answer(tokens, verifications, histogram, *arrivals, stopped=True) -> Answer:
    return Answer("…", 3, tokens, verifications, tuple(histogram), arrivals, stopped)


ANSWERS = [
    answer(10, 3, [0, 1, 0, 2], (0.1, 1), (0.2, 3), (0.5, 6), (0.6, 10)),
    answer(2, 1, [1], (0.3, 1), (0.4, 2), stopped=False),
    answer(1, 0, [], (0.2, 1)),
]


def test_tau_weighs_every_token_the_same():
    figures = figures_of(ANSWERS, seconds=2.0, refused=1, accuracy=0.5)
    assert figures.tau == (10 + 2 + 1) / (3 + 1 + 0)
    assert (figures.completion_tokens, figures.verifications, figures.answers, figures.refused) == (13, 4, 3, 1)
    assert figures.output_tokens_per_second == 6.5
    assert figures.stopped == 2 / 3 and figures.accuracy == 0.5


def test_acceptance_by_depth():
    figures = figures_of(ANSWERS, 1.0, 0, None)
    assert figures.histogram == [1, 1, 0, 2]
    assert figures.acceptance_per_position == [3 / 4, 2 / 4, 2 / 4]
    assert acceptance_per_position([]) == acceptance_per_position([5]) == []
    accepted = np.repeat(np.arange(4), [5, 3, 2, 7])
    assert acceptance_per_position([5, 3, 2, 7]) == [np.mean(accepted > depth) for depth in range(3)]


def test_latencies():
    figures = figures_of(ANSWERS, 1.0, 0, None)
    assert figures.time_to_first_token == {"p50": 0.2, "p95": 0.3, "p99": 0.3}
    assert figures.latency == {"p50": 0.4, "p95": 0.6, "p99": 0.6}
    gaps = [0.05] * 2 + [0.1] * 3 + [0.025] * 4 + [0.1]
    assert figures.inter_token_latency["p50"] == pytest.approx(np.percentile(gaps, 50, method="inverted_cdf"))


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 101, 999])
def test_percentiles_are_nearest_ranks(count):
    values = np.random.default_rng(count).random(count).tolist()
    expected = np.percentile(values, [50, 95, 99], method="inverted_cdf")
    assert list(percentiles(values).values()) == expected.tolist()


def test_without_a_draft():
    figures = figures_of([answer(1, 0, [], (0.2, 1))], 1.0, 0, None)
    assert figures.tau is None and figures.histogram == [] and figures.acceptance_per_position == []
    assert figures.inter_token_latency == {}
