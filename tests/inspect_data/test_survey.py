"""The pass over the data: refused rows, counts by side and source, and its memory."""

import tracemalloc
from collections.abc import Sequence

import pytest

from nemo_speculative.data.conversations import Split, TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.inspect_data import survey as surveys
from nemo_speculative.inspect_data.survey import Survey
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_tokenizer
from tests.inspect_data.conftest import END, VOCAB, dialogue, random_rows

NOTHING = lambda item, row: None  # noqa: E731


def surveyed(tokenization, training, held_out=(), show=(), look=NOTHING) -> Survey:
    survey = Survey(tokenization, show)
    survey.read(Split(list(training), list(held_out)), look)
    return survey


def test_counts_by_side_and_source(tokenization):
    rows = random_rows(50)
    supervised = [row for row in rows if any(row.loss_mask)]
    survey = surveyed(tokenization, rows[:40], rows[40:])
    for held_out, part in ((False, rows[:40]), (True, rows[40:]), (None, rows)):
        for source in (None, "", "code", "math"):
            expected = [r for r in part if r in supervised and source in (None, r.source)]
            total = survey.total(held_out=held_out, source=source)
            assert sorted(total.lengths) == sorted(len(r.input_ids) for r in expected)
    assert survey.sources == ["", "code", "math"]
    assert survey.unsupervised.count == len(rows) - len(supervised) > 0


def test_the_number_of_sources_is_limited(tokenization):
    rows = [TokenRow(f"r{n}", [5], [True], f"f:{n}", f"source {n}") for n in range(100)]
    survey = surveyed(tokenization, rows)
    assert len(survey.sources) == surveys.MAX_SOURCES + 1
    assert survey.total(source=surveys.OTHERS).conversations == 100 - surveys.MAX_SOURCES
    assert survey.total().conversations == 100


def test_refused_rows_are_counted_by_reason_and_the_others_are_read(tokenization):
    good = dialogue("u:a", "a:b", identity="good")
    silent = [dialogue("u:a", identity=f"silent{n}", origin=f"data.jsonl:{n}") for n in range(8)]
    outside = TokenRow("outside", [VOCAB], [True], "data.jsonl:9")
    items = []
    survey = surveyed(
        tokenization, [*silent, outside, good], look=lambda item, row: items.append((item.id, row is None))
    )
    assert survey.refused.count == 9
    reasons = survey.refused.reasons.most_common()
    assert [n for _, n in reasons] == [8, 1]
    assert "has no assistant turn" in reasons[0][0] and "data.jsonl" not in reasons[0][0]
    assert f"token id {VOCAB} is not in" in reasons[1][0]
    assert len(survey.refused.examples) == surveys.MAX_EXAMPLES
    assert "data.jsonl:0" in survey.refused.examples[0]
    assert survey.total().conversations == 1
    assert items == [(c.id, True) for c in (*silent, outside)] + [("good", False)]


def test_the_number_of_reasons_is_limited():
    left_out = surveys.LeftOut()
    for n in range(50):
        left_out.add(f"id {n}", f"reason {n}")
    assert left_out.count == sum(left_out.reasons.values()) == 50
    assert left_out.reasons[surveys.OTHERS] == 50 - surveys.MAX_REASONS


def test_the_first_three_or_the_named_rows_are_shown(tokenization):
    talks = [dialogue("u:q", f"a:{n}", identity=f"id{n}", origin=f"data.jsonl:{n + 10}") for n in range(6)]
    assert [row.id for row in surveyed(tokenization, talks).shown] == ["id0", "id1", "id2"]
    assert [row.id for row in surveyed(tokenization, talks[:4], talks[4:], show=["12", "id5"]).shown] == ["id2", "id5"]


def test_an_unknown_id_to_show(tokenization):
    with pytest.raises(UserError) as caught:
        surveyed(tokenization, [dialogue("u:q", "a:b")], show=["c", "nowhere"])
    assert str(caught.value).startswith("show: no conversation among 1 has the id 'nowhere'")
    assert "\n" not in str(caught.value)


def test_a_refused_row_to_show_is_reported(tokenization):
    survey = surveyed(tokenization, [dialogue("u:q", "a:b"), dialogue("u:q", identity="silent")], show=["silent"])
    assert (survey.shown, survey.not_shown) == ([], ["silent"])


def test_a_tokenizer_without_a_template_is_an_error():
    tokenization = Tokenization(make_tokenizer(template=None), {END}, 256, VOCAB)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        surveyed(tokenization, [dialogue("u:q", "a:b")])
    assert surveyed(tokenization, [TokenRow("r", [4], [True], "f:1")]).total().conversations == 1


class GeneratedRows(Sequence[TokenRow]):
    """Rows that are created when they are read."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n):
        if not 0 <= n < self.count:
            raise IndexError(n)
        return TokenRow(str(n), [n % VOCAB] * 200, [True] * 200, f"f:{n}")


def test_memory_does_not_grow_with_the_rows(tokenization):
    def peak(count: int) -> int:
        tracemalloc.start()
        Survey(tokenization).read(Split(GeneratedRows(count), []), NOTHING)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert (peak(3000) - peak(300)) / 2700 < 64, "bytes a row of 200 tokens"
