"""Greedy decoding gives the target's own answers, token for token, with any draft."""

import pytest

from nemo_speculative.decoding.drafters import EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import generate
from nemo_speculative.evaluation.acceptance import Measured
from tests.decoding.models import DRAFTS, NO_STOP, TREE_BUILDERS, plain, prompts, random_draft, small_target

PROMPTS, LIMIT = prompts(200), 8


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return small_target(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def answers(target):
    result = plain(target, PROMPTS, LIMIT)
    assert len({tuple(answer) for answer in result}) > 50, "equal answers would prove little"
    return result


@pytest.mark.parametrize("tree", TREE_BUILDERS)
@pytest.mark.parametrize("kind", DRAFTS)
def test_every_draft_and_tree_gives_the_targets_own_answers(target, answers, kind, tree):
    drafter = EagleDrafter(random_draft(kind, target), target, TREE_BUILDERS[tree])
    result = generate(target, drafter, PROMPTS, max_new_tokens=LIMIT, stop_ids=NO_STOP)
    assert [g.tokens for g in result] == answers
    accepted = Measured(result).acceptance_per_position(4)
    assert accepted[1] > 0.001 and accepted[0] < 0.95, "nothing accepted, or nothing rejected, proves little"


@pytest.mark.parametrize("drafter", [NoDrafter(), NgramDrafter(5)], ids=["plain", "n-gram"])
def test_plain_and_ngram_decoding_give_the_targets_own_answers(target, answers, drafter):
    result = generate(target, drafter, PROMPTS, max_new_tokens=LIMIT, stop_ids=NO_STOP)
    assert [g.tokens for g in result] == answers
    tau = Measured(result).tau
    assert tau == 1 if isinstance(drafter, NoDrafter) else tau > 1.1
