"""The dense implementation of the benchmark computes the same, so that the benchmark compares like with like."""

import pytest

from benchmarks.textbook import textbook_loss
from tests.algorithms.objectives.cases import (
    DECAY,
    STEPS,
    FrozenStandIn,
    assert_same_gradients,
    eagle3,
    lay_out,
    make_documents,
    run,
)


@pytest.mark.parametrize("draft_vocab", [23, 9])
def test_textbook_and_ours_give_one_loss_and_one_gradient(draft_vocab):
    case, documents = eagle3(draft_vocab), make_documents([13, 9, 21, 6])
    draft = case.make_draft()
    rows = [documents[:2], documents[2:]]
    expected, expected_gradients, _ = run(draft, case.make_objective(), [(rows, 32)])
    draft.zero_grad()
    loss = textbook_loss(draft, FrozenStandIn(), *lay_out(rows, 32), STEPS, DECAY)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert_same_gradients({n: p.grad for n, p in draft.named_parameters()}, expected_gradients, tolerance=2e-6)
