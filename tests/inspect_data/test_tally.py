"""Counts over rows, compared with naive counts."""

from collections import Counter

import numpy as np
import pytest

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.inspect_data.survey import COVERAGE_BINS, Tally, span_lengths
from tests.inspect_data.conftest import VOCAB, random_rows

MAX_LENGTH = 300


def counted(rows) -> Tally:
    tally = Tally(VOCAB, MAX_LENGTH)
    for row in rows:
        tally.add(row)
    return tally


def naive_spans(mask: list[bool]) -> int:
    return "".join("x" if inside else " " for inside in mask).split().__len__()


def test_every_count_equals_a_naive_one():
    rows = random_rows(200)
    tally = counted(rows)
    assert tally.tokens == sum(len(r.input_ids) for r in rows)
    assert tally.supervised == sum(sum(r.loss_mask) for r in rows)
    assert tally.turns == Counter(naive_spans(r.loss_mask) for r in rows)
    assert tally.silent == sum("".join("x" if m else " " for m in r.loss_mask).split().count("x") for r in rows) > 0
    assert list(tally.lengths) == [len(r.input_ids) for r in rows]
    shares = [sum(r.loss_mask) / len(r.loss_mask) for r in rows]
    naive = np.histogram(shares, np.arange(COVERAGE_BINS + 1) / COVERAGE_BINS)[0].tolist()
    assert [tally.coverage[n] for n in range(COVERAGE_BINS)] == naive
    cut = [(r.input_ids[:MAX_LENGTH], r.loss_mask[:MAX_LENGTH]) for r in rows]
    assert list(tally.documents) == [len(ids) for ids, mask in cut if any(mask)]
    tokens = Counter(i for ids, mask in cut for i, inside in zip(ids, mask, strict=True) if inside)
    assert {i: n for i, n in enumerate(tally.token_counts.tolist()) if n} == tokens


def test_truncation_equals_a_naive_one_at_every_length():
    rows = [*random_rows(200), *(TokenRow("exact", [1] * n, [True] * n, "f:1") for n in (128, MAX_LENGTH, 512))]
    tally = counted(rows)
    assert MAX_LENGTH in tally.limits
    for n, limit in enumerate(tally.limits.tolist()):
        assert tally.truncated[n] == sum(len(r.input_ids) > limit for r in rows)
        assert tally.tokens_lost[n] == sum(len(r.input_ids[limit:]) for r in rows)
        assert tally.supervised_lost[n] == sum(sum(r.loss_mask[limit:]) for r in rows)
        assert tally.left_out[n] == sum(not any(r.loss_mask[:limit]) for r in rows)


def test_parts_add_up_to_the_whole():
    rows = random_rows(60)
    parts, whole = counted(rows[:25]), counted(rows)
    parts.merge(counted(rows[25:]))
    for name, value in vars(whole).items():
        assert np.array_equal(vars(parts)[name], value), name


def test_turns_are_answers_and_roles_messages_where_there_are_messages():
    tally, row = Tally(VOCAB, MAX_LENGTH), random_rows(1)[0]
    tally.add(row, ["system", "user", "assistant", "tool", "assistant"])
    assert tally.turns == {2: 1}
    assert tally.roles == {"system": 1, "user": 1, "assistant": 2, "tool": 1}


@pytest.mark.parametrize(("mask", "runs"), [("1", 1), ("0", 0), ("110011", 2), ("0101", 2), ("1111", 1)])
def test_runs_of_the_mask(mask, runs):
    assert len(span_lengths(np.array([c == "1" for c in mask]))) == runs
