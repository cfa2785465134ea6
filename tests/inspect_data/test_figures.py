"""The report's numbers compared with naive formulas."""

import json
import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from nemo_speculative.data.batch import pack
from nemo_speculative.data.conversations import Split, TokenRow
from nemo_speculative.inspect_data.survey import Survey, Tally, figures, lengths, next_fit
from tests.inspect_data.conftest import VOCAB, random_rows

MAX_LENGTH, ROW_TOKENS, SEED = 256, 512, 3
ROWS = random_rows(150)
SPLIT = Split(ROWS[:120], [*ROWS[120:], *ROWS[:4]])
"""A split of which four held-out rows are also in training."""


def figures_of(tokenization, split):
    survey = Survey(tokenization)
    survey.read(split, lambda item, row: None)
    return figures(survey, split, ROW_TOKENS, SEED)


@pytest.fixture
def values(tokenization):
    return figures_of(tokenization, SPLIT)


def cut(rows: list[TokenRow]) -> list[TokenRow]:
    return [row.cut(MAX_LENGTH) for row in rows if any(row.loss_mask[:MAX_LENGTH])]


def supervised(rows: list[TokenRow]) -> Counter[int]:
    return Counter(i for r in rows for i, inside in zip(r.input_ids, r.loss_mask, strict=True) if inside)


def test_the_totals(values):
    rows = [r for r in (*SPLIT.training, *SPLIT.held_out) if any(r.loss_mask)]
    assert values["conversations"] == len(rows) == values["training"] + values["held_out"]
    assert values["tokens"] == sum(len(r.input_ids) for r in rows)
    assert values["supervised_share"] == sum(sum(r.loss_mask) for r in rows) / values["tokens"]
    assert sum(values["coverage_histogram"]) == sum(values["turns"].values()) == len(rows)
    assert values["unsupervised"]["count"] == len(SPLIT.training) + len(SPLIT.held_out) - len(rows)
    assert json.loads(json.dumps(values))["tokens"] == values["tokens"], "plain values"


def test_packing_is_that_of_a_training(values):
    documents = [len(r.input_ids) for r in cut(SPLIT.training)]
    ways = values["packing"]["ways"]
    rows = pack(documents, ROW_TOKENS, SEED)
    assert ways["best fit, as in training"] == {"rows": len(rows), "fill": sum(documents) / len(rows) / ROW_TOKENS}
    assert ways["a row each, padded"]["fill"] == sum(documents) / len(documents) / ROW_TOKENS
    fills = [way["fill"] for way in ways.values()]
    assert fills == sorted(fills, reverse=True)


def test_next_fit_equals_a_naive_one():
    sizes = [random.Random(n).randint(1, 50) for n in range(200)]
    rows = [[]]
    for size in sizes:
        if sum(rows[-1]) + size > 50:
            rows.append([])
        rows[-1].append(size)
    assert next_fit(sizes, 50) == len(rows)
    assert next_fit([], 50) == 0


def test_the_coverage_of_a_vocabulary_equals_a_naive_one(values):
    counts, held = supervised(cut(SPLIT.training)), supervised(cut(SPLIT.held_out))
    ranked = sorted(range(VOCAB), key=lambda i: (-counts[i], i))
    vocabulary = values["vocabulary"]
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


def test_truncation_ends_at_the_first_length_that_cuts_nothing(values):
    limits = [at["length"] for at in values["truncation"]]
    longest = max(len(r.input_ids) for r in ROWS)
    assert limits == [128, 256, 512, 1024] and 512 < longest <= 1024
    rows = [r for r in (*SPLIT.training, *SPLIT.held_out) if any(r.loss_mask)]
    at = values["truncation"][1]
    assert at["supervised_lost"] == sum(sum(r.loss_mask[256:]) for r in rows) / sum(sum(r.loss_mask) for r in rows)
    assert values["truncation"][-1]["tokens_lost"] == 0


def test_duplicates_and_held_out_rows_in_training(values, tokenization):
    assert (
        values["duplicates"]["copies"]
        == values["duplicates"]["held_out_in_training"]
        == sum(any(r.loss_mask) for r in ROWS[:4])
    )
    row = TokenRow("a", [5, 6, 7], [True] * 3, "f:1")
    assert figures_of(tokenization, Split([row], [row, row]))["duplicates"]["held_out_in_training"] == 2
    same = [TokenRow(name, [5, 6, 7], [False, True, True], "f:2") for name in "bcd"]
    other = TokenRow("e", [5, 6], [True] * 2, "f:3")
    copies = figures_of(tokenization, Split([other, row, *same], []))["duplicates"]
    assert copies == {
        "copies": 3, "groups": 1, "held_out_in_training": 0, "largest": [{"rows": 4, "ids": ["a", "b", "c"]}]
    }  # fmt: skip


def test_lengths():
    tally, sizes = Tally(VOCAB, MAX_LENGTH), [1, 2, 3, 64, 90, 91, 127, 128, 700]
    for size in sizes:
        tally.add(TokenRow("r", [1] * size, [True] * size, "f"))
    values = lengths(tally)
    histogram = values["histogram"]
    edges = [edge for edge, _ in histogram] + [math.inf]
    naive = [sum(low <= size < high for size in sizes) for low, high in pairwise(edges)]
    assert [count for _, count in histogram] == naive
    assert values["quantiles"] == {"0.0": 1, "0.5": 90, "0.9": 700, "0.99": 700, "1.0": 700}


def test_figures_without_rows(tokenization):
    values = figures_of(tokenization, Split([TokenRow("r", [1], [False], "f:1")], []))
    assert values["conversations"] == 0 and values["supervised_share"] == 0.0
    assert values["vocabulary"]["table"] == values["lengths"]["histogram"] == []
