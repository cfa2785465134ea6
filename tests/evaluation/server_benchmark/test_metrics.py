"""Metrics of a point, computed by hand and by numpy."""

import numpy as np
import pytest

from nemo_speculative.decoding.tau import acceptance_length, acceptance_per_position
from nemo_speculative.evaluation.server_benchmark.results import BenchMetrics, percentiles
from nemo_speculative.serving.client import Answer


def answer(tokens, verifications, histogram, *arrivals, stopped=True) -> Answer:
    return Answer("…", 3, tokens, verifications, tuple(histogram), arrivals, stopped)


ANSWERS = [
    answer(10, 3, [0, 1, 0, 2], (0.1, 1), (0.2, 3), (0.5, 6), (0.6, 10)),
    answer(2, 1, [1], (0.3, 1), (0.4, 2), stopped=False),
    answer(1, 0, [], (0.2, 1)),
]


def test_tau_weighs_every_token_equally():
    metrics = BenchMetrics.of(ANSWERS, seconds=2.0, refused=1, accuracy=0.5)
    assert metrics.tau == (10 + 2 + 1) / (3 + 1 + 0)
    assert (metrics.completion_tokens, metrics.verifications, metrics.answers, metrics.refused) == (13, 4, 3, 1)
    assert metrics.output_tokens_per_second == 6.5
    assert metrics.stopped == 2 / 3 and metrics.accuracy == 0.5


def test_no_verifications_have_no_acceptance_length():
    assert acceptance_length(6, 4) == 1.5 and acceptance_length(1, 0) is None


def test_acceptance_by_depth():
    metrics = BenchMetrics.of(ANSWERS, 1.0, 0, None)
    assert metrics.histogram == [1, 1, 0, 2]
    assert metrics.acceptance_per_position == [3 / 4, 2 / 4, 2 / 4]
    assert acceptance_per_position([]) == acceptance_per_position([5]) == []
    accepted = np.repeat(np.arange(4), [5, 3, 2, 7])
    assert acceptance_per_position([5, 3, 2, 7]) == [np.mean(accepted > depth) for depth in range(3)]


def test_latencies():
    metrics = BenchMetrics.of(ANSWERS, 1.0, 0, None)
    assert metrics.time_to_first_token == {"p50": 0.2, "p95": 0.3, "p99": 0.3}
    assert metrics.latency == {"p50": 0.4, "p95": 0.6, "p99": 0.6}
    gaps = [0.05] * 2 + [0.1] * 3 + [0.025] * 4 + [0.1]
    assert metrics.inter_token_latency["p50"] == pytest.approx(np.percentile(gaps, 50, method="inverted_cdf"))


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 101, 999])
def test_percentiles_are_nearest_ranks(count):
    values = np.random.default_rng(count).random(count).tolist()
    expected = np.percentile(values, [50, 95, 99], method="inverted_cdf")
    assert list(percentiles(values).values()) == expected.tolist()


def test_without_a_draft():
    metrics = BenchMetrics.of([answer(1, 0, [], (0.2, 1))], 1.0, 0, None)
    assert metrics.tau is None and metrics.histogram == [] and metrics.acceptance_per_position == []
    assert metrics.inter_token_latency == {}
