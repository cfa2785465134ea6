"""Choice of the number of tokens verified at once: the fewest seconds per token on the same questions."""

import pytest

from nemo_speculative.config.schema import EvaluationConfig, ExporterConfig
from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree
from nemo_speculative.decoding.engine import Generation
from nemo_speculative.evaluation.acceptance import Measured, cheapest, describe_widths, measure_widths
from nemo_speculative.utils.errors import UserError
from tests.decoding.models import random_draft


def measured(tokens, seconds):
    return Measured([Generation([1] * tokens, [tokens])], seconds)


def test_the_cheapest_settings_need_the_fewest_seconds_per_token():
    figures = {8: measured(40, 4.0), 16: measured(60, 5.0), 32: measured(70, 7.0)}
    widths = {SpeculativeSettings(5, 4, size): of_size for size, of_size in figures.items()}
    assert cheapest(widths).num_draft_tokens == 16
    table = describe_widths(widths).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["8", "16", "32"]
    assert table[3].split() == ["16", "60.00", "83.33", "<-"]


def test_every_width_answers_every_question_alike(target):
    draft, prompts = random_draft("eagle3", target, draft_vocab=200), [[5, 9, 30], [7, 8]]
    widths = measure_widths(target, draft, prompts, 3, 2, EvaluationConfig(max_new_tokens=12))
    assert [s.num_draft_tokens for s in widths] == [8, largest_tree(3, 2)] and all(s.topk == 2 for s in widths)
    answers = [[g.tokens for g in of_size.generations] for of_size in widths.values()]
    assert len(answers[0]) == 2 and answers.count(answers[0]) == len(answers)
    assert all(of_size.seconds > 0 for of_size in widths.values())


def test_a_chain_has_no_width_to_choose():
    with pytest.raises(UserError, match=r"exporter\.num_draft_tokens is auto: .* expected num_steps \+ 1"):
        ExporterConfig(num_draft_tokens="auto")
    exporter = ExporterConfig(topk=4, num_draft_tokens="auto")
    assert exporter.measure_width and exporter.speculative == SpeculativeSettings(5, 4, 21)


@pytest.mark.parametrize("value", ["many", 2.5, True, 0, -3])
def test_an_invalid_number_of_draft_tokens_is_refused(value):
    with pytest.raises(UserError, match=r"exporter\.num_draft_tokens is .*: .* expected a number from "):
        ExporterConfig(topk=4, num_draft_tokens=value)
