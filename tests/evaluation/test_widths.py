"""Choosing how many tokens to verify at once: the same questions for every width, the fewest seconds per token."""

import pytest

from nemo_speculative.config.schema import EvaluationConfig, ExporterConfig
from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree
from nemo_speculative.decoding.engine import Generation
from nemo_speculative.evaluation.acceptance import Measured
from nemo_speculative.evaluation.widths import Width, cheapest, describe_widths, measure_widths
from nemo_speculative.utils.errors import UserError
from tests.decoding.models import random_draft


def width(tokens, seconds, size):
    return Width(SpeculativeSettings(5, 4, size), Measured([Generation([1] * tokens, [tokens])], seconds))


def test_the_cheapest_is_the_one_of_the_fewest_seconds_per_token():
    widths = [width(40, 4.0, 8), width(60, 5.0, 16), width(70, 7.0, 32)]
    assert cheapest(widths).settings.num_draft_tokens == 16
    table = describe_widths(widths).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["8", "16", "32"]
    assert table[3].split() == ["16", "60.00", "83.33", "<-"]


def test_every_width_answers_every_question_alike(target):
    draft, prompts = random_draft("eagle3", target, draft_vocab=200), [[5, 9, 30], [7, 8]]
    config = EvaluationConfig(max_new_tokens=12)
    widths = measure_widths(target, draft, prompts, 3, 2, config)
    sizes = [w.settings.num_draft_tokens for w in widths]
    assert sizes == [8, largest_tree(3, 2)] and all(w.settings.topk == 2 for w in widths)
    answers = [[g.tokens for g in w.measured.generations] for w in widths]
    assert len(answers[0]) == 2 and answers.count(answers[0]) == len(answers)
    assert all(w.measured.seconds > 0 for w in widths)


def test_a_chain_has_no_width_to_choose():
    with pytest.raises(UserError, match=r"exporter\.num_draft_tokens is auto: a chain"):
        ExporterConfig(num_draft_tokens="auto")
    exporter = ExporterConfig(topk=4, num_draft_tokens="auto")
    assert exporter.measure_width and exporter.speculative == SpeculativeSettings(5, 4, 21)


@pytest.mark.parametrize("value", ["many", 2.5, True, 0, -3])
def test_what_is_no_number_of_tokens(value):
    with pytest.raises(UserError, match=r"exporter\.num_draft_tokens is .*: expected a number above 0, or auto"):
        ExporterConfig(topk=4, num_draft_tokens=value)
