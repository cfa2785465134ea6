"""The results log: what is on disk counts."""

import json
from dataclasses import replace

import pytest

from nemo_speculative.evaluation.server_benchmark.results import FILE, BenchMetrics, BenchPoint, BenchResult, ResultsLog
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils.errors import UserError

DRAFT = {"weights": "abc", "speculative": {"num_steps": 5, "topk": 1, "num_draft_tokens": 6}, "flags": ["EAGLE3"]}
POINT = BenchPoint("mt_bench", "digest", 64, 4, 0.0, {"sglang": "0.5.23", "flags": ["--dtype", "float32"]}, DRAFT)
METRICS = BenchMetrics.of([Answer("a", 3, 4, 2, (0, 2), ((0.1, 1), (0.3, 4)), True)], 0.5, 0, None)


def test_results_are_read_back(tmp_path):
    log = ResultsLog(tmp_path / "new")
    assert not log.has(POINT)
    log.append(BenchResult(POINT, METRICS))
    again = ResultsLog(tmp_path / "new")
    assert again.has(POINT) and again.get(POINT) == BenchResult(POINT, METRICS)
    line = json.loads((tmp_path / "new" / FILE).read_text())
    assert line["key"] == POINT.key and line["time"] and line["machine"]["cores"] and line["version"]


@pytest.mark.parametrize(
    "changed",
    [
        {"suite": "gsm8k"}, {"suite_digest": "other"}, {"max_new_tokens": 65}, {"concurrency": 8}, {"temperature": 1.0},
        {"server": {**POINT.server, "sglang": "0.5.9"}}, {"server": {**POINT.server, "flags": ["--dtype", "bfloat16"]}},
        {"draft": None}, {"draft": {**DRAFT, "weights": "abd"}}, {"draft": {**DRAFT, "flags": []}},
        {"draft": {**DRAFT, "speculative": {"num_steps": 5, "topk": 2, "num_draft_tokens": 6}}},
    ],
)  # fmt: skip
def test_a_different_point_has_no_result(changed, tmp_path):
    log = ResultsLog(tmp_path)
    log.append(BenchResult(POINT, METRICS))
    assert not log.has(replace(POINT, **changed))


def test_a_draft_is_compared_with_its_baseline():
    baseline = replace(POINT, draft=None)
    assert baseline.comparison_key == POINT.comparison_key and baseline.key != POINT.key
    assert (baseline.setting, POINT.setting) == ("baseline", "5-1-6")
    assert replace(POINT, concurrency=1).comparison_key != POINT.comparison_key


def test_a_failed_point_is_measured_again_and_its_last_line_counts(tmp_path):
    log = ResultsLog(tmp_path)
    log.append(BenchResult(POINT, None, "the server died"))
    assert not ResultsLog(tmp_path).has(POINT) and ResultsLog(tmp_path).get(POINT).error == "the server died"
    log.append(BenchResult(POINT, METRICS))
    assert ResultsLog(tmp_path).has(POINT) and len(list(ResultsLog(tmp_path))) == 1


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_measured_again(cut, tmp_path):
    log, other = ResultsLog(tmp_path), replace(POINT, concurrency=8)
    log.append(BenchResult(POINT, METRICS))
    log.append(BenchResult(other, METRICS))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    again = ResultsLog(tmp_path)
    assert again.has(POINT) and not again.has(other)
    again.append(BenchResult(other, METRICS))
    assert ResultsLog(tmp_path).has(other) and len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "3", '{"key": "a"}', "\xff"])
def test_a_foreign_line_is_refused(line, tmp_path):
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(UserError, match=rf"{FILE}:1: not a line of this benchmark .* results=DIR"):
        ResultsLog(tmp_path)
