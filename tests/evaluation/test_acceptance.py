from dataclasses import replace

import pytest
import torch

from nemo_speculative.config.schema import EvaluationConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.decoding.engine import Generation
from nemo_speculative.evaluation.acceptance import (
    Evaluation,
    Measured,
    cpu_threads,
    evaluate_draft,
    measure_tau,
    prompt_of,
    question_prompts,
)
from nemo_speculative.utils.errors import UserError
from tests.decoding.models import plain, prompts, random_draft, small_target

CHAIN, TREE = SpeculativeSettings(3, 1, 4), SpeculativeSettings(3, 3, 8)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return small_target(tmp_path_factory.mktemp("small"))


def config(**values):
    return EvaluationConfig(**{"max_new_tokens": 16, "num_threads": 1} | values)


def test_acceptance_figures_by_hand():
    """Verifications emitting 3, 1 and 2 tokens: τ = 2, and 1 + the acceptances is τ."""
    measured = Measured([Generation([0] * 5, [3, 1], True), Generation([0] * 3, [2], False)], seconds=4.0)
    assert measured.tau == 2.0 and measured.tau_finished == 2.0 and measured.tokens_per_second == 2.0
    assert measured.acceptance_per_position(3) == pytest.approx([2 / 3, 1 / 3, 0])
    assert 1 + sum(measured.acceptance_per_position(5)) == pytest.approx(measured.tau)
    assert Measured([Generation([0], [], True)]).tau_finished is None


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_draft_is_compared_with_its_baselines(target, settings):
    """The answers are the target's own; every figure of the summary is there; a batch measures the same."""
    questions, draft = prompts(7, shortest=3), random_draft("eagle3", target)
    one, three = (evaluate_draft(target, draft, questions, settings, config(batch_size=n)) for n in (1, 3))
    limit = [g.tokens for g in one.plain.generations]
    expected = plain(target, questions, 16, target.stop_ids)
    assert limit == [g.tokens for g in one.draft.generations] == [g.tokens for g in one.ngram.generations] == expected
    assert one.lossless is True and one.plain.tau == 1.0 and one.draft.tau > 1.02
    for way in ("draft", "plain", "ngram"):
        assert getattr(one, way).generations == getattr(three, way).generations
    summary = one.summary()
    assert set(Evaluation.FIGURES) <= set(summary) and summary["questions"] == 7
    assert len(summary["acceptance_per_position"]) == 3
    assert 1 + sum(summary["acceptance_per_position"]) == pytest.approx(summary["tau"])
    assert summary["speculative"]["num_draft_tokens"] == settings.num_draft_tokens


def test_a_tree_accepts_more_than_its_chain(target):
    questions, draft = prompts(20), random_draft("eagle", target)
    chain, tree = (measure_tau(target, draft, questions, settings, config(batch_size=8)) for settings in (CHAIN, TREE))
    assert 1 < chain < tree


@pytest.mark.parametrize("settings, rejection", [(CHAIN, True), (CHAIN, False), (TREE, False)])
def test_sampled_answers_are_not_compared_token_by_token(target, settings, rejection):
    drawn = config(temperature=1.0, rejection_sampling=rejection, batch_size=5, seed=3)
    result = [evaluate_draft(target, random_draft("eagle3", target), prompts(5), settings, drawn) for _ in range(2)]
    assert result[0].lossless is None and result[0].summary()["lossless"] is None
    assert result[0].draft.generations == result[1].draft.generations, "one seed, one result"
    other = evaluate_draft(target, random_draft("eagle3", target), prompts(5), settings, replace(drawn, seed=4))
    assert other.draft.generations != result[0].draft.generations


def test_different_answers_are_not_lossless():
    same, other = Measured([Generation([1, 2], [1])]), Measured([Generation([1, 3], [1])])
    assert Evaluation(same, same, same, CHAIN).lossless is True
    assert Evaluation(other, same, same, CHAIN).lossless is False


def test_settings_that_cannot_be_measured_are_one_line(target):
    draft = random_draft("eagle3", target)
    for settings, values, message in [
        (SpeculativeSettings(3, 1, 3), {}, "num_draft_tokens is 3"),
        (SpeculativeSettings(2, 10, 12), {}, "topk is 10"),
        (TREE, {"temperature": 1.0, "rejection_sampling": True}, "rejection sampling is not lossless"),
    ]:
        for measure in (evaluate_draft, measure_tau):
            with pytest.raises(UserError, match=message) as error:
                measure(target, draft, prompts(1), settings, config(**values))
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1.0}, "evaluation.temperature is -1.0"),
        ({"temperature": float("nan")}, "evaluation.temperature is nan"),
        ({"top_p": 0.0}, "evaluation.top_p is 0.0"),
        ({"top_k": -1}, "evaluation.top_k is -1"),
        ({"batch_size": 0}, "evaluation.batch_size is 0"),
    ],
)
def test_sampling_out_of_range_is_refused_by_its_key(values, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**values)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_prompts_end_where_the_first_answer_begins():
    rows = [TokenRow(str(n), list(range(n + 4)), [False] * n + [True] * 4, "") for n in (0, 3, 9, 5)]
    assert question_prompts(rows, limit=2, max_prompt=8) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert prompt_of(rows[1], None) == [0, 1, 2]
    assert prompt_of(TokenRow("0", [4, 5], [False, False], ""), None) == [4, 5]
