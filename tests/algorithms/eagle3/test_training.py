import pytest
import torch

from nemo_speculative.algorithms.common.ttt import chain_sums
from tests.algorithms.cases import (
    STEPS,
    VOCAB,
    FrozenStandIn,
    eagle3,
    lay_out,
    make_documents,
    oracle_of,
    run,
)


def test_tau_is_one_plus_the_probabilities_that_a_chain_is_correct():
    """Correct tokens by slot and step, counted by hand: the chain of a slot ends at its first incorrect one."""
    objective = eagle3().make_objective()
    hits = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    supervised = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    sums = {"loss": torch.zeros(STEPS), "weight": supervised.sum(1), **chain_sums(hits, supervised)}
    held = [sum(all(hits[j, s] for j in range(i + 1)) and bool(supervised[i, s]) for s in range(3)) for i in range(4)]
    expected = 1 + sum(h / int(supervised[i].sum()) for i, h in enumerate(held))
    assert objective.metrics(sums)["tau"] == pytest.approx(expected)


def test_a_slot_outside_the_draft_vocabulary_is_counted_but_has_no_loss():
    """Every label's argmax is moved outside: no loss and no gradient, but the slots count, and all are incorrect."""
    case, documents = eagle3(9), make_documents([13])
    draft, objective = case.make_draft(), case.make_objective()
    outside = next(i for i in range(VOCAB) if i not in set(draft.draft_ids.tolist()))
    (row, aux, last), favourite = documents[0], FrozenStandIn().head[outside]
    moved = [(row, aux, last + 40 * favourite)]
    loss, gradients, metrics = run(draft, objective, [([moved], 13)])
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    assert metrics["acc_0"] == 0 and metrics["tau"] == 1
    again, _, counts, _ = oracle_of(case, draft, documents)
    assert again > 0 and objective.schedule(lay_out([moved], 13)[0]).counts.tolist() == counts
