"""Table and heat map of results with given speeds."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from nemo_speculative.evaluation.server_benchmark.results import COLUMNS, BenchResult, best, heat_map, table
from tests.evaluation.server_benchmark.test_results import DRAFT, METRICS, POINT


def result(setting, concurrency, speed, temperature=0.0, suite="mt_bench") -> BenchResult:
    names = ("num_steps", "topk", "num_draft_tokens")
    draft = {**DRAFT, "speculative": dict(zip(names, setting, strict=True))} if setting else None
    point = replace(POINT, draft=draft, concurrency=concurrency, temperature=temperature, suite=suite)
    return BenchResult(point, replace(METRICS, output_tokens_per_second=speed))


RESULTS = [
    result((3, 1, 4), 8, 150.0), result((5, 4, 16), 8, 90.0), result(None, 8, 100.0),
    result((3, 1, 4), 1, 30.0), result((5, 4, 16), 1, 36.0), result(None, 1, 12.0),
    result((5, 1, 6), 1, 99.0, temperature=1.0),
]  # fmt: skip
FAILED = BenchResult(replace(POINT, concurrency=99), None, "died")


def rows(text: str) -> list[dict[str, str]]:
    lines = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines()]
    assert tuple(lines[0]) == COLUMNS
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines[2:]]


def test_the_fastest_comes_first_with_its_speed_up():
    cells = [(r["temperature"], r["at once"], r["setting"], r["speed-up"]) for r in rows(table([*RESULTS, FAILED]))]
    assert cells == [
        ("0", "1", "5-4-16", "3.00x"), ("0", "1", "3-1-4", "2.50x"), ("0", "1", "baseline", "1.00x"),
        ("0", "8", "3-1-4", "1.50x"), ("0", "8", "baseline", "1.00x"), ("0", "8", "5-4-16", "0.90x"),
        ("1", "1", "5-1-6", "-"),
    ]  # fmt: skip


def test_a_row_shows_the_metrics():
    row = rows(table([BenchResult(POINT, replace(METRICS, accuracy=0.25))]))[0]
    assert row["tau"] == "2.00" and row["accepted by depth"] == "1.00" and row["accuracy"] == "0.25"
    assert (
        row["first token ms"] == "100.0"
        and row["inter-token ms p50/p95/p99"] == "66.7/66.7/66.7"
        and row["latency ms"] == "300.0"
    )


@pytest.mark.parametrize(("concurrency", "setting"), [(1, "5-4-16"), (8, "3-1-4")])
def test_the_best_setting_at_a_concurrency(concurrency, setting):
    assert best([*RESULTS, FAILED], concurrency, 0.0).point.setting == setting


def test_a_baseline_is_never_the_best_setting():
    assert best([result(None, 1, 9.0), FAILED], 1, 0.0) is None


def test_the_heat_map_shows_every_result():
    picture = ElementTree.fromstring(heat_map([*RESULTS, FAILED]))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("3.00x", "2.50x", "1.50x", "0.90x", "150.0", "8 at once", "5-4-16", "baseline", "99.0"):
        assert expected in texts
    assert sum("temperature" in text for text in texts) == 2, "a panel for each temperature"
    fills = {box.get("fill") for box in picture.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(fills) >= 5, "different gains, different colors"


def test_the_heat_map_escapes_names():
    picture = ElementTree.fromstring(heat_map([result(None, 1, 1.0, suite="<a> & b")]))
    assert any("<a> & b" in (element.text or "") for element in picture.iter())


def test_no_results():
    assert table([]).count("\n") == 1
    ElementTree.fromstring(heat_map([]))
