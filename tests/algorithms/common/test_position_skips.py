"""Position skips: how they are drawn, what they change, and that a draft attends to far tokens with them."""

from dataclasses import replace

import pytest
import torch

from nemo_speculative.algorithms.common.schedule import skipped_positions
from nemo_speculative.config.schema import Eagle3DraftConfig, EagleDraftConfig
from nemo_speculative.data.batch import collate
from nemo_speculative.utils.errors import UserError
from tests.algorithms.cases import (
    EXACT,
    assert_drawn_for_conversations,
    assert_same_gradients,
    document,
    eagle,
    eagle3,
    lay_out,
    make_documents,
    oracle_of,
    run,
)
from tests.algorithms.recall import LENGTH, OFFSET, train_and_measure

CASES = {
    "eagle1": eagle(),
    "eagle3": eagle3(9),
    "eagle3.1, 2 layers": eagle3(norm_output=True, num_layers=2),
    "hass": eagle(3, topk_w=1.0),
}


def skipped(rows, width, longest=100, seed=0, epochs=None):
    return skipped_positions(collate(rows, width, 0, epochs), longest, seed)


def test_each_document_has_one_uniform_skip_within_the_limit():
    length, longest, count = 8, 20, 4000
    moved = skipped([[document(str(n), length) for n in range(count)]], length * count, longest).view(count, length)
    steps = moved.diff(dim=1)
    assert (moved[:, 0] == 0).all() and ((steps > 1).sum(1) <= 1).all() and (steps >= 1).all()
    cuts, skips = torch.bincount((steps > 1).int().argmax(1)[moved[:, -1] >= length]), moved[:, -1] - (length - 1)
    for drawn, cases in ((cuts, length - 1), (torch.bincount(skips), longest - length + 1)):
        share = drawn / drawn.sum()
        assert len(share) == cases
        assert ((share - 1 / cases).abs() <= 5 * (1 / cases / count) ** 0.5).all()


def test_a_document_without_room_has_no_skip():
    for length in (30, 31, 40):
        assert torch.equal(skipped([[document("a", length)]], length, longest=30)[0], torch.arange(length))
    assert skipped([[document("one token", 1)]], 4, longest=30)[0, 0] == 0


def test_draws_depend_on_conversation_epoch_and_seed_and_not_on_the_layout():
    padding = assert_drawn_for_conversations(skipped)
    assert torch.equal(padding, torch.arange(10))


def test_a_batch_that_does_not_name_its_conversations_is_an_error():
    batch = replace(collate([[document("a", 5)]], 8, 0), spans=())
    with pytest.raises(ValueError, match="no spans"):
        eagle3().make_objective(position_offset=20).schedule(batch)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradient_are_those_of_the_skipped_positions(case):
    lengths, longest, seed = [13, 9, 15, 6], 200, 5
    draft, documents = case.make_draft(), make_documents(lengths)
    objective = case.make_objective(seed=seed, position_offset=longest)
    loss, gradients, _ = run(draft, objective, [([documents[:2]], 32), ([documents[2:]], 32)])
    position_ids = [skipped([[row]], len(row.input_ids), longest, seed)[0].tolist() for row, _, _ in documents]
    expected, expected_gradients, _, _ = oracle_of(case, draft, documents, position_ids=lambda n, t: position_ids[n][t])
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)
    _, others, _, _ = oracle_of(case, draft, documents)
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients, others, 100 * EXACT)


def test_the_target_and_validation_have_the_true_positions():
    batch, _ = lay_out([make_documents([13, 9])], 32)
    objective = eagle3().make_objective(position_offset=100)
    training, validation = objective.schedule(batch), objective.schedule(batch, training=False)
    assert torch.equal(training.batch.positions, batch.positions)
    assert not torch.equal(training.layout.position_ids, batch.positions.flatten())
    assert torch.equal(validation.layout.position_ids, batch.positions.flatten())


@pytest.mark.parametrize("config", [Eagle3DraftConfig, EagleDraftConfig])
def test_an_offset_that_leaves_no_room_is_refused(config):
    for offset in (None, 65):
        config(position_offset=offset).check_positions(64)
    with pytest.raises(UserError, match=r"draft\.position_offset is 64: expected more than data\.max_length=64"):
        config(position_offset=64).check_positions(64)
    with pytest.raises(UserError, match=r"draft\.position_offset is 0"):
        config(position_offset=0)


def test_tau_at_four_times_the_training_length_holds_with_skips_and_collapses_without():
    """The tokens depend on the document's first one, which only the draft's attention can read."""
    found = {offset: train_and_measure(offset, seed=0) for offset in (None, OFFSET)}
    assert all(tau[LENGTH] > 4.5 for tau in found.values())
    assert found[OFFSET][4 * LENGTH] >= 0.8 * found[OFFSET][LENGTH]
    assert found[None][4 * LENGTH] < 0.6 * found[None][LENGTH]
