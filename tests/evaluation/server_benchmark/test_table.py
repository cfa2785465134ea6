"""Tables and pictures of cells whose speeds are given."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from nemo_speculative.evaluation.server_benchmark.heatmap import heat_map
from nemo_speculative.evaluation.server_benchmark.results_log import Measured
from nemo_speculative.evaluation.server_benchmark.table import HEAD, best, table
from tests.evaluation.server_benchmark.test_cells import CELL, DRAFT, FIGURES


def measured(setting, concurrency, speed, temperature=0.0, suite="mt_bench") -> Measured:
    names = ("num_steps", "topk", "num_draft_tokens")
    draft = {**DRAFT, "speculative": dict(zip(names, setting, strict=True))} if setting else None
    cell = replace(CELL, draft=draft, concurrency=concurrency, temperature=temperature, suite=suite)
    return Measured(cell, replace(FIGURES, output_tokens_per_second=speed))


CELLS = [
    measured((3, 1, 4), 8, 150.0), measured((5, 4, 16), 8, 90.0), measured(None, 8, 100.0),
    measured((3, 1, 4), 1, 30.0), measured((5, 4, 16), 1, 36.0), measured(None, 1, 12.0),
    measured((5, 1, 6), 1, 99.0, temperature=1.0),
]  # fmt: skip
FAILED = Measured(replace(CELL, concurrency=99), None, "died")


def rows(text: str) -> list[dict[str, str]]:
    lines = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines()]
    assert tuple(lines[0]) == HEAD
    return [dict(zip(HEAD, line, strict=True)) for line in lines[2:]]


def test_the_fastest_first_beside_its_own_baseline():
    found = [(r["temperature"], r["at once"], r["setting"], r["speed-up"]) for r in rows(table([*CELLS, FAILED]))]
    assert found == [
        ("0", "1", "5-4-16", "3.00x"), ("0", "1", "3-1-4", "2.50x"), ("0", "1", "baseline", "1.00x"),
        ("0", "8", "3-1-4", "1.50x"), ("0", "8", "baseline", "1.00x"), ("0", "8", "5-4-16", "0.90x"),
        ("1", "1", "5-1-6", "-"),
    ]  # fmt: skip


def test_a_row_says_what_was_measured():
    row = rows(table([Measured(CELL, replace(FIGURES, accuracy=0.25))]))[0]
    assert row["tau"] == "2.00" and row["accepted by depth"] == "1.00" and row["accuracy"] == "0.25"
    assert (
        row["first token ms"] == "100.0"
        and row["inter-token ms p50/p95/p99"] == "66.7/66.7/66.7"
        and row["latency ms"] == "300.0"
    )


@pytest.mark.parametrize(("concurrency", "setting"), [(1, "5-4-16"), (8, "3-1-4")])
def test_the_best_setting_of_a_concurrency(concurrency, setting):
    assert best([*CELLS, FAILED], concurrency, 0.0).cell.setting == setting


def test_a_baseline_is_never_the_best_setting():
    assert best([measured(None, 1, 9.0), FAILED], 1, 0.0) is None


def test_the_heat_map_holds_every_cell():
    picture = ElementTree.fromstring(heat_map([*CELLS, FAILED]))
    said = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("3.00x", "2.50x", "1.50x", "0.90x", "150.0", "8 at once", "5-4-16", "baseline", "99.0"):
        assert expected in said
    assert sum("temperature" in text for text in said) == 2, "a panel for each temperature"
    fills = {box.get("fill") for box in picture.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(fills) >= 5, "different gains, different colors"


def test_words_of_a_suite_cannot_break_the_picture():
    picture = ElementTree.fromstring(heat_map([measured(None, 1, 1.0, suite="<a> & b")]))
    assert any("<a> & b" in (element.text or "") for element in picture.iter())


def test_nothing_measured():
    assert table([]).count("\n") == 1
    ElementTree.fromstring(heat_map([]))
