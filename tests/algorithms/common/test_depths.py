"""Sampled depths: how they are drawn, and that the gradient is the weighted loss's on average."""

from dataclasses import replace

import pytest
import torch

from nemo_speculative.algorithms.common.schedule import geometric_depths
from nemo_speculative.config.schema import DepthSampling, Normalization
from nemo_speculative.data.batch import collate
from tests.algorithms.cases import (
    DECAY,
    EXACT,
    STEPS,
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

SAMPLED = {"depth_sampling": DepthSampling.geometric}
CASES = {
    "eagle3": eagle3(9),
    "eagle3.1, 2 layers": eagle3(norm_output=True, num_layers=2),
    "hass": eagle(3, topk_w=1.0),
}


def depths(rows, width, decay=DECAY, seed=0, epochs=None):
    return geometric_depths(collate(rows, width, 0, epochs), decay, seed)


@pytest.mark.parametrize("decay", [0.8, 0.3, 0.97])
def test_a_slot_runs_more_than_i_steps_with_probability_decay_to_the_i(decay):
    n = 200_000
    drawn = depths([[document("a", n // 2)], [document("b", n // 2)]], n // 2, decay)
    assert int(drawn.min()) == 1
    for i in range(10):
        p = decay**i
        share = float((drawn > i).double().mean())
        assert abs(share - p) <= 5 * (p * (1 - p) / n) ** 0.5


def test_draws_depend_on_conversation_epoch_and_seed_and_not_on_the_layout():
    padding = assert_drawn_for_conversations(depths)
    assert (padding == 1).all() and len(padding) == 10


def test_a_batch_that_does_not_name_its_conversations_is_an_error():
    batch = replace(collate([[document("a", 5)]], 8, 0), spans=())
    with pytest.raises(ValueError, match="no spans"):
        eagle3().make_objective(**SAMPLED).schedule(batch)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalization", list(Normalization))
def test_loss_and_gradient_are_those_of_the_sampled_slots_at_weight_one(case, normalization):
    """The oracle counts every supervised slot and runs the sampled ones."""
    lengths, seed = [13, 9, 21, 6], 5
    draft, documents = case.make_draft(), make_documents(lengths)
    objective = case.make_objective(normalization=normalization, seed=seed, **SAMPLED)
    loss, gradients, metrics = run(draft, objective, [([documents[:2]], 32), ([documents[2:]], 32)])
    drawn = [depths([[row]], len(row.input_ids), seed=seed)[0].tolist() for row, _, _ in documents]
    kept = {"runs": lambda n, t, i: i < drawn[n][t], "by_conversation": normalization is Normalization.conversation}
    expected, expected_gradients, counts, _ = oracle_of(case, draft, documents, decay=1.0, **kept)
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)
    full, _, all_counts, _ = oracle_of(case, draft, documents, decay=1.0)
    assert full != pytest.approx(expected, rel=0.01) and counts == all_counts
    assert all(0 <= metrics[f"acc_{i}"] <= 1 for i in range(case.num_steps))


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).double()


def test_the_mean_gradient_is_that_of_the_weighted_loss():
    """Over seeds, along random directions and the one in which the two losses differ: within 5 standard errors."""
    case, decay, seeds = eagle3(9), 0.5, 300
    draft, layout = case.make_draft(), [([make_documents([13, 9])], 22)]
    of = lambda **settings: run(draft, case.make_objective(**settings), layout)  # noqa: E731
    weighted, unweighted = (of(step_decay=x) for x in (decay, 1.0))
    apart = flat(unweighted[1]) - flat(weighted[1])
    random = torch.randn(len(apart), 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.cat((apart[:, None], random), dim=1)
    made = [of(step_decay=decay, seed=seed, **SAMPLED) for seed in range(seeds)]
    found = torch.stack([torch.cat((flat(g) @ directions, torch.tensor([loss]))) for loss, g, _ in made])

    def errors(expected):
        """By how many standard errors the mean is off, along each direction and in the loss."""
        objective = torch.cat((flat(expected[1]) @ directions, torch.tensor([expected[0]])))
        return ((found.mean(0) - objective) / (found.std(0) / seeds**0.5)).abs()

    assert errors(weighted).max() < 5
    off = errors(unweighted)
    assert off[0] > 10 and off[-1] > 10


def test_validation_samples_nothing():
    """The same pairs, weights and counts as without sampling; the loss of its metrics is the weighted one."""
    case, documents = eagle3(9), make_documents([13, 9, 21])
    batch, supervision = lay_out([documents], 48)
    draft, sampled, plain = case.make_draft(), case.make_objective(**SAMPLED), case.make_objective()
    schedule, expected = sampled.schedule(batch, training=False), plain.schedule(batch)
    assert torch.equal(schedule.chunks[0].supervised, expected.chunks[0].supervised)
    assert torch.equal(schedule.step_weights, DECAY ** torch.arange(STEPS, dtype=torch.float64))
    assert sampled.schedule(batch).chunks[0].supervised.sum() < schedule.chunks[0].supervised.sum()
    with torch.no_grad():
        losses = [
            g.metrics(g.loss(draft, s, supervision, s.counts).sums) for g, s in ((sampled, schedule), (plain, expected))
        ]
    assert losses[0] == losses[1]
