"""Every algorithm against its float64 oracle, and in every layout."""

from dataclasses import replace

import pytest
import torch

from nemo_speculative.config.schema import DepthSampling, FeatureNoise, Normalization
from tests.algorithms.cases import (
    EXACT,
    assert_same_gradients,
    eagle,
    eagle3,
    lay_out,
    make_documents,
    oracle_of,
    run,
)

CASES = {
    "eagle3": eagle3(),
    "eagle3, reduced vocabulary": eagle3(9),
    "fc_norm": eagle3(fc_norm=True),
    "norm_before_fc": eagle3(norm_before_fc=True),
    "norm_output": eagle3(norm_output=True),
    "eagle3.1, 2 layers": eagle3(9, fc_norm=True, norm_output=True, num_layers=2),
    "eagle3, 3 layers": eagle3(num_layers=3),
    "eagle1": eagle(),
    "eagle1, 2 layers": eagle(num_layers=2),
    "hass": eagle(num_steps=3, num_layers=2, ploss_w=0.3, topk_w=1.0),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def test_loss_and_every_gradient_equal_the_float64_oracle(case):
    draft, documents = case.make_draft(), make_documents([13, 9, 21, 6])
    loss, gradients, metrics = run(draft, case.make_objective(), [([documents[:3], documents[3:]], 48)])
    expected, expected_gradients, counts, hits = oracle_of(case, draft, documents)
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)
    for i, (count, hit) in enumerate(zip(counts, hits, strict=True)):
        assert metrics[f"acc_{i}"] == pytest.approx(hit / count)


def test_normalized_by_conversation(case):
    """Every conversation weighs the same, however long its answer is."""
    draft, documents = case.make_draft(), make_documents([13, 9, 21, 6])
    objective = case.make_objective(normalization=Normalization.conversation)
    loss, gradients, _ = run(draft, objective, [([documents[:3]], 48), ([documents[3:]], 10)])
    expected, expected_gradients, _, _ = oracle_of(case, draft, documents, by_conversation=True)
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)


def test_small_chunks_change_nothing(case):
    """Chunks start inside a document, and read tokens of the row before."""
    draft, layouts = case.make_draft(), [([make_documents([90, 30]), make_documents([120], seed=1)], 128)]
    loss, gradients, metrics = run(draft, case.make_objective(), layouts)
    few = case.make_objective(chunk_slots=64)
    assert len(few.schedule(lay_out(*layouts[0])[0]).chunks) >= 3
    again, in_parts, metrics_again = run(draft, few, layouts)
    assert again == pytest.approx(loss, rel=EXACT) and metrics_again == pytest.approx(metrics, rel=EXACT)
    assert_same_gradients(in_parts, gradients)


def test_every_trainable_parameter_gets_a_gradient(case):
    _, gradients, _ = run(case.make_draft(), case.make_objective(), [([make_documents([15])], 16)])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


CONVERSATION = {"normalization": Normalization.conversation}
SAMPLED = {"depth_sampling": DepthSampling.geometric}
LAYOUTS = {
    "unpacked": lambda d: [([[x] for x in d], 21)],
    "padded": lambda d: [([[x] for x in d], 64)],
    "one row": lambda d: [([d], 60)],
    "other order": lambda d: [([d[::-1]], 60)],
    "accumulated": lambda d: [([[x]], 30) for x in d],
    "uneven split": lambda d: [([d[2:], [d[0]]], 40), ([[d[1]]], 9)],
}


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    "case, settings",
    [
        (eagle3(9, fc_norm=True, norm_output=True, num_layers=2), {}),
        (eagle3(9), CONVERSATION),
        (eagle3(9), SAMPLED),
        (eagle3(num_layers=2), SAMPLED | CONVERSATION),
        (eagle(num_steps=2, noise=FeatureNoise.official), {}),
        (eagle(noise=FeatureNoise.paper, topk_w=1.0), CONVERSATION),
    ],
    ids=["eagle3.1", "eagle3, conversation", "sampled", "sampled, conversation", "noisy", "noisy, conversation"],
)
def test_loss_and_gradients_do_not_depend_on_padding_packing_or_split(layouts, case, settings):
    draft, documents = case.make_draft(), make_documents([13, 9, 21, 6])
    objective = case.make_objective(**settings)
    expected, expected_gradients, expected_metrics = run(draft, objective, [([documents[:2], documents[2:]], 32)])
    loss, gradients, metrics = run(draft, objective, layouts(documents))
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients, 2 * EXACT)
    assert metrics == pytest.approx(expected_metrics, rel=EXACT)


def test_a_document_does_not_leak_into_its_neighbor(case):
    """Changing one document of a row changes nothing that the others contribute, to the loss or to a gradient."""
    draft, objective = case.make_draft(), case.make_objective()
    documents, others = make_documents([13, 9, 12]), make_documents([13, 9, 12], seed=1)
    changed = [documents[0], others[1], documents[2]]
    counts = torch.ones(case.num_steps, dtype=torch.float64)

    def contribution(row):
        batch, supervision = lay_out([row], 40)
        muted = batch.loss_mask.clone()
        muted[0, 13:22] = False
        batch = replace(batch, loss_mask=muted)
        draft.zero_grad()
        loss = objective.loss(draft, objective.schedule(batch), supervision, counts).loss
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in draft.named_parameters()}

    (loss, gradients), (again, same_gradients) = contribution(documents), contribution(changed)
    assert again == pytest.approx(loss, rel=EXACT)
    assert_same_gradients(same_gradients, gradients)
