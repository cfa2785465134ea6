"""The report's numbers beside naive formulas."""

import json
import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from nemo_speculative.data.batch import pack
from nemo_speculative.data.conversations import Split, TokenRow
from nemo_speculative.inspect_data.figures import figures, lengths, next_fit
from nemo_speculative.inspect_data.survey import Survey, Tally
from tests.inspect_data.conftest import VOCAB, random_rows

MAX_LENGTH, ROW_TOKENS, SEED = 256, 512, 3
ROWS = random_rows(150)
SPLIT = Split(ROWS[:120], [*ROWS[120:], *ROWS[:4]])
"""Four held-out rows are trained on as well."""


def found_in(how, split):
    survey = Survey(how)
    survey.read(split, lambda item, row: None)
    return figures(survey, split, ROW_TOKENS, SEED)


@pytest.fixture
def found(how):
    return found_in(how, SPLIT)


def cut(rows: list[TokenRow]) -> list[TokenRow]:
    return [row.cut(MAX_LENGTH) for row in rows if any(row.loss_mask[:MAX_LENGTH])]


def supervised(rows: list[TokenRow]) -> Counter[int]:
    return Counter(i for r in rows for i, inside in zip(r.input_ids, r.loss_mask, strict=True) if inside)


def test_the_totals(found):
    rows = [r for r in (*SPLIT.training, *SPLIT.held_out) if any(r.loss_mask)]
    assert found["conversations"] == len(rows) == found["training"] + found["held_out"]
    assert found["tokens"] == sum(len(r.input_ids) for r in rows)
    assert found["supervised_share"] == sum(sum(r.loss_mask) for r in rows) / found["tokens"]
    assert sum(found["coverage_histogram"]) == sum(found["turns"].values()) == len(rows)
    assert found["unsupervised"]["count"] == len(SPLIT.training) + len(SPLIT.held_out) - len(rows)
    assert json.loads(json.dumps(found))["tokens"] == found["tokens"], "plain values"


def test_the_packing_is_that_of_a_training(found):
    documents = [len(r.input_ids) for r in cut(SPLIT.training)]
    ways = found["packing"]["ways"]
    rows = pack(documents, ROW_TOKENS, SEED)
    assert ways["best fit, as in training"] == {"rows": len(rows), "fill": sum(documents) / len(rows) / ROW_TOKENS}
    assert ways["a row each, padded"]["fill"] == sum(documents) / len(documents) / ROW_TOKENS
    fills = [way["fill"] for way in ways.values()]
    assert fills == sorted(fills, reverse=True)


def test_next_fit_is_a_naive_one():
    sizes = [random.Random(n).randint(1, 50) for n in range(200)]
    rows = [[]]
    for size in sizes:
        if sum(rows[-1]) + size > 50:
            rows.append([])
        rows[-1].append(size)
    assert next_fit(sizes, 50) == len(rows)
    assert next_fit([], 50) == 0


def test_the_coverage_of_a_vocabulary_is_the_naive_one(found):
    counts, held = supervised(cut(SPLIT.training)), supervised(cut(SPLIT.held_out))
    ranked = sorted(range(VOCAB), key=lambda i: (-counts[i], i))
    vocabulary = found["vocabulary"]
    assert vocabulary["distinct"] == len(counts)
    assert [row["entries"] for row in vocabulary["table"]] == [VOCAB // 8, VOCAB // 4, VOCAB // 2, VOCAB]
    for point in [*vocabulary["curve"], *vocabulary["table"]]:
        inside = set(ranked[: point["entries"]])
        assert point["training"] == pytest.approx(sum(counts[i] for i in inside) / counts.total())
        assert point["held_out"] == pytest.approx(sum(held[i] for i in inside) / held.total())
    half = set(ranked[: VOCAB // 2])
    for source, covered in vocabulary["table"][2]["sources"].items():
        own = supervised(cut([r for r in (*SPLIT.training, *SPLIT.held_out) if r.source == source]))
        assert covered == pytest.approx(sum(own[i] for i in half) / own.total())
    for part, entries in vocabulary["reach"].items():
        assert sum(counts[i] for i in ranked[:entries]) / counts.total() >= float(part)
        assert sum(counts[i] for i in ranked[: entries - 64]) / counts.total() < float(part)


def test_truncation_ends_at_the_first_length_that_cuts_nothing(found):
    limits = [at["length"] for at in found["truncation"]]
    longest = max(len(r.input_ids) for r in ROWS)
    assert limits == [128, 256, 512, 1024] and 512 < longest <= 1024
    rows = [r for r in (*SPLIT.training, *SPLIT.held_out) if any(r.loss_mask)]
    at = found["truncation"][1]
    assert at["supervised_lost"] == sum(sum(r.loss_mask[256:]) for r in rows) / sum(sum(r.loss_mask) for r in rows)
    assert found["truncation"][-1]["tokens_lost"] == 0


def test_copies_and_what_is_trained_and_measured_on(found, how):
    assert (
        found["duplicates"]["copies"]
        == found["duplicates"]["held_out_in_training"]
        == sum(any(r.loss_mask) for r in ROWS[:4])
    )
    row = TokenRow("a", [5, 6, 7], [True] * 3, "f:1")
    assert found_in(how, Split([row], [row, row]))["duplicates"]["held_out_in_training"] == 2
    same = [TokenRow(name, [5, 6, 7], [False, True, True], "f:2") for name in "bcd"]
    other = TokenRow("e", [5, 6], [True] * 2, "f:3")
    copies = found_in(how, Split([other, row, *same], []))["duplicates"]
    assert copies == {
        "copies": 3, "groups": 1, "held_out_in_training": 0, "largest": [{"rows": 4, "ids": ["a", "b", "c"]}]
    }  # fmt: skip


def test_lengths():
    tally, sizes = Tally(VOCAB, MAX_LENGTH), [1, 2, 3, 64, 90, 91, 127, 128, 700]
    for size in sizes:
        tally.add(TokenRow("r", [1] * size, [True] * size, "f"))
    found = lengths(tally)
    histogram = found["histogram"]
    edges = [edge for edge, _ in histogram] + [math.inf]
    naive = [sum(low <= size < high for size in sizes) for low, high in pairwise(edges)]
    assert [count for _, count in histogram] == naive
    assert found["quantiles"] == {"0.0": 1, "0.5": 90, "0.9": 700, "0.99": 700, "1.0": 700}


def test_no_row_at_all(how):
    found = found_in(how, Split([TokenRow("r", [1], [False], "f:1")], []))
    assert found["conversations"] == 0 and found["supervised_share"] == 0.0
    assert found["vocabulary"]["table"] == found["lengths"]["histogram"] == []
