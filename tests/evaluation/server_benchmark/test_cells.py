"""The file of cells: what is on disk counts, and nothing else."""

import json
from dataclasses import replace

import pytest

from nemo_speculative.evaluation.server_benchmark.metrics import figures_of
from nemo_speculative.evaluation.server_benchmark.results_log import FILE, Cell, Measured, ResultsLog
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils.errors import UserError

DRAFT = {"weights": "abc", "speculative": {"num_steps": 5, "topk": 1, "num_draft_tokens": 6}, "flags": ["EAGLE3"]}
CELL = Cell("mt_bench", "digest", 64, 4, 0.0, {"sglang": "0.5.23", "flags": ["--dtype", "float32"]}, DRAFT)
FIGURES = figures_of([Answer("a", 3, 4, 2, (0, 2), ((0.1, 1), (0.3, 4)), True)], 0.5, 0, None)


def test_what_was_measured_is_read_back(tmp_path):
    ledger = ResultsLog(tmp_path / "new")
    assert not ledger.has(CELL)
    ledger.append(Measured(CELL, FIGURES))
    again = ResultsLog(tmp_path / "new")
    assert again.has(CELL) and again.get(CELL) == Measured(CELL, FIGURES)
    line = json.loads((tmp_path / "new" / FILE).read_text())
    assert line["key"] == CELL.key and line["time"] and line["machine"]["cores"] and line["version"]


@pytest.mark.parametrize(
    "changed",
    [
        {"suite": "gsm8k"}, {"suite_digest": "other"}, {"max_new_tokens": 65}, {"concurrency": 8}, {"temperature": 1.0},
        {"server": {**CELL.server, "sglang": "0.5.9"}}, {"server": {**CELL.server, "flags": ["--dtype", "bfloat16"]}},
        {"draft": None}, {"draft": {**DRAFT, "weights": "abd"}}, {"draft": {**DRAFT, "flags": []}},
        {"draft": {**DRAFT, "speculative": {"num_steps": 5, "topk": 2, "num_draft_tokens": 6}}},
    ],
)  # fmt: skip
def test_another_cell_is_measured_anew(changed, tmp_path):
    ledger = ResultsLog(tmp_path)
    ledger.append(Measured(CELL, FIGURES))
    assert not ledger.has(replace(CELL, **changed))


def test_rivals_differ_in_the_draft_alone():
    baseline = replace(CELL, draft=None)
    assert baseline.rivals == CELL.rivals and baseline.key != CELL.key
    assert (baseline.setting, CELL.setting) == ("baseline", "5-1-6")
    assert replace(CELL, concurrency=1).rivals != CELL.rivals


def test_a_failed_cell_is_measured_again_and_its_last_line_counts(tmp_path):
    ledger = ResultsLog(tmp_path)
    ledger.append(Measured(CELL, None, "the server died"))
    assert not ResultsLog(tmp_path).has(CELL) and ResultsLog(tmp_path).get(CELL).error == "the server died"
    ledger.append(Measured(CELL, FIGURES))
    assert ResultsLog(tmp_path).has(CELL) and len(list(ResultsLog(tmp_path))) == 1


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_measured_again(cut, tmp_path):
    ledger, other = ResultsLog(tmp_path), replace(CELL, concurrency=8)
    ledger.append(Measured(CELL, FIGURES))
    ledger.append(Measured(other, FIGURES))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    again = ResultsLog(tmp_path)
    assert again.has(CELL) and not again.has(other)
    again.append(Measured(other, FIGURES))
    assert ResultsLog(tmp_path).has(other) and len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "3", '{"key": "a"}', "\xff"])
def test_another_file_is_refused(line, tmp_path):
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(UserError, match=rf"{FILE}:1: not a line of this benchmark .* results=DIR"):
        ResultsLog(tmp_path)
