"""The noise of EAGLE-1: its size, and that it belongs to the conversation and the epoch alone."""

import pytest
import torch

from nemo_speculative.algorithms.eagle.training import document_noise
from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import collate
from tests.algorithms.cases import HIDDEN, document, eagle, lay_out, make_documents


def noise(rows, width, kind=FeatureNoise.paper, seed=0, epochs=None):
    batch = collate(rows, width, 0, epochs)
    return document_noise(batch, torch.zeros(len(rows), width, HIDDEN), kind, seed)


def test_uniform_within_a_tenth_and_nothing_on_padding():
    drawn = noise([[document("a", 2000)]], 2100)
    assert not drawn[0, 2000:].any()
    inside = drawn[0, :2000]
    assert inside.abs().max() <= 0.1 and inside.abs().max() > 0.0999
    assert inside.mean().abs() < 1e-3
    assert float(inside.std()) == pytest.approx(0.2 / 12**0.5, rel=0.01)  # of a uniform on an interval of 0.2


def test_the_official_scaling_is_by_the_length_of_the_conversation():
    paper, official = (noise([[document("a", 64)]], 70, kind) for kind in (FeatureNoise.paper, FeatureNoise.official))
    torch.testing.assert_close(official, paper * 512 / 64)


def test_it_depends_on_conversation_epoch_and_seed_and_not_on_the_layout():
    a, b = document("a", 5), document("b", 7)
    packed, other = noise([[a, b]], 20), noise([[b], [a]], 12)
    torch.testing.assert_close(packed[0, :5], other[1, :5])
    torch.testing.assert_close(packed[0, 5:12], other[0, :7])
    assert not torch.equal(packed[0, :5], packed[0, 5:10])
    assert not torch.equal(packed, noise([[a, b]], 20, seed=1))
    assert not torch.equal(packed, noise([[a, b]], 20, epochs=[1]))


def test_labels_and_validation_stay_clean():
    case = eagle(noise=FeatureNoise.paper)
    draft, objective, clean = case.make_draft(), case.make_objective(), eagle().make_objective()
    batch, supervision = lay_out([make_documents([13])], 13)
    schedule = objective.schedule(batch)
    loss = lambda g: float(g.loss(draft, schedule, supervision, schedule.counts).loss.detach())  # noqa: E731
    assert loss(objective) != loss(clean)
    with torch.no_grad():
        assert loss(objective) == loss(clean)
    seen = []
    objective.labels = lambda draft, hidden: seen.append(hidden) or clean.labels(draft, hidden)
    loss(objective)
    positions = schedule.chunks[0].label_positions
    assert torch.equal(torch.cat(seen), supervision.last_hidden_state.flatten(0, 1)[positions])
