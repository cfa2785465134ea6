"""Head and loss chunk by chunk, against autograd over all logits at once."""

import pytest
import torch

from nemo_speculative.algorithms.common import losses as losses_module
from nemo_speculative.algorithms.common import schedule as schedule_module
from nemo_speculative.algorithms.common.losses import (
    LOGITS_PER_CHUNK,
    RowLosses,
    SoftCrossEntropy,
    chunked_linear_loss,
)
from tests.algorithms import cases
from tests.algorithms.cases import (
    HIDDEN,
    VOCAB,
    eagle,
    eagle3,
    lay_out,
    make_documents,
)
from tests.algorithms.common.test_losses import LOSSES
from tests.observing import LargestTensor

CHUNKS = {
    "at once": ({}, {}),
    "few labels": ({"LABEL_CHUNK": {"cpu": 5}}, {}),
    "few rows": ({}, {"LOGITS_PER_CHUNK": {"cpu": 0}}),
    "few rows in a block": ({}, {"LOGITS_PER_CHUNK": {"cpu": 200 * VOCAB}, "LOGITS_PER_BLOCK": {"cpu": 0}}),
    "few of all": ({"LABEL_CHUNK": {"cpu": 33}}, {"LOGITS_PER_CHUNK": {"cpu": 0}, "LOGITS_PER_BLOCK": {"cpu": 0}}),
}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunks(request, monkeypatch):
    for module, limits in zip((schedule_module, losses_module), request.param, strict=True):
        for name, limit in limits.items():
            monkeypatch.setattr(module, name, limit)


class LinearLossCase:
    """Rows of a few documents, inputs of a head, and the expected loss."""

    def __init__(self, loss=None, draft_vocab=VOCAB, dtype=torch.float32):
        case = eagle3(draft_vocab)
        self.draft, self.objective, self.distance = case.make_draft(), case.make_objective(), loss or SoftCrossEntropy()
        self.target, self.objective.loss_function = self.objective.target, self.distance
        batch, supervision = lay_out([make_documents([40, 40]), make_documents([70], seed=1)], 80)
        (self.rows,) = self.objective.schedule(batch).chunks
        self.last_hidden_state = supervision.last_hidden_state.flatten(0, 1)
        random = torch.Generator().manual_seed(3)
        rows = len(self.rows.weight)
        self.states = torch.randn(rows, HIDDEN, generator=random).to(dtype).requires_grad_()
        self.weight = torch.randn(len(self.draft.draft_ids), HIDDEN, generator=random).to(dtype).requires_grad_()
        self.row_weight = torch.rand(rows, generator=random) * self.rows.weight

    def chunked(self, head):
        rows = self.rows
        return chunked_linear_loss(
            self.states, head, self.row_weight, rows.label_chunks, rows.label,
            lambda span: self.objective.labels(self.draft, self.last_hidden_state[rows.label_positions[span]]),
            lambda *of_rows: self.objective.row_losses(self.draft, *of_rows),
            len(self.weight),
        )  # fmt: skip

    def at_once(self, project):
        """Loss, values and correct: logits of all rows, labels of all rows, autograd."""
        logits = project(self.states)
        target = self.target.logits(self.last_hidden_state)[self.rows.label_positions[self.rows.label]]
        best, ids = target.argmax(-1), self.draft.draft_ids
        inside = torch.isin(best, ids)
        values = self.distance(logits, target[:, ids].softmax(-1)) * inside
        return (values * self.row_weight).sum(), values, ids[logits.argmax(-1)] == best


def capped(case):
    return lambda states: 3 * torch.tanh(states @ case.weight.detach().T / 3)


def squashed(case):
    return lambda states: torch.tanh(states @ case.weight.detach().T)


HEADS = {
    "own": (lambda case: case.weight, lambda case: lambda x: x @ case.weight.T),
    "frozen": (lambda case: case.target.logits, lambda case: case.target.logits),
    "frozen, soft-capped": (capped, capped),
    "frozen, its logits needed to go back": (squashed, squashed),
}


@pytest.mark.parametrize("upstream", [1.0, -3.7])
@pytest.mark.parametrize(("head", "project"), HEADS.values(), ids=HEADS)
def test_chunks_equal_autograd_over_all_logits(chunks, head, project, upstream):
    case = LinearLossCase()
    expected, values, correct = case.at_once(project(case))
    wanted = torch.autograd.grad(expected * upstream, (case.states, case.weight), materialize_grads=True)
    loss, found_values, computed_correct = case.chunked(head(case))
    gradients = torch.autograd.grad(loss * upstream, (case.states, case.weight), materialize_grads=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found_values["loss"], values)
    assert torch.equal(computed_correct, correct) and correct.any() and not correct.all()
    for found, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    assert gradients[1].any() == (head is HEADS["own"][0])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("draft_vocab", [VOCAB, 9])
def test_every_loss_in_chunks(chunks, loss, draft_vocab):
    case = LinearLossCase(loss, draft_vocab)
    expected, _, correct = case.at_once(lambda x: x @ case.weight.T)
    wanted = torch.autograd.grad(expected, (case.states, case.weight))
    found, _, computed_correct = case.chunked(case.weight)
    torch.testing.assert_close(found, expected)
    assert torch.equal(computed_correct, correct)
    for one, two in zip(torch.autograd.grad(found, (case.states, case.weight)), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_without_gradients_the_values_are_the_same_and_no_gradient_is_computed(chunks, name, monkeypatch):
    case, head = LinearLossCase(), HEADS[name][0]
    loss, values, correct = case.chunked(head(case))
    monkeypatch.setattr(losses_module, "KnownGradients", None)  # called, it would fail
    with torch.no_grad():
        again, same_values, same_correct = case.chunked(head(case))
    assert not again.requires_grad and torch.equal(again, loss.detach())
    assert torch.equal(same_values["loss"], values["loss"]) and torch.equal(same_correct, correct)


def test_bfloat16_is_close_to_float32(chunks):
    half, exact = LinearLossCase(dtype=torch.bfloat16), LinearLossCase()
    with torch.no_grad():
        exact.states.copy_(half.states)
        exact.weight.copy_(half.weight)
    pairs = []
    for case in (half, exact):
        loss, _, _ = case.chunked(case.weight)
        gradients = torch.autograd.grad(loss, (case.states, case.weight))
        assert all(gradient.dtype == case.states.dtype for gradient in gradients)
        pairs.append([loss.detach(), *gradients])
    for one, two in zip(*pairs, strict=True):
        assert (one.double() - two).norm() <= 0.01 * two.double().norm()


def test_chunks_of_a_bfloat16_head_add_up_in_float32():
    """1 and 256 times 1/256: in bfloat16 the sum would stay 1."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    row_weight = torch.tensor([1.0, *[1 / 256] * 256])
    count = len(row_weight)

    def row_losses(logits, labels, weight):
        return RowLosses({"loss": logits[:, 0].float()}, labels[0], weight[:, None].to(logits.dtype))

    loss, _, _ = chunked_linear_loss(
        torch.ones(count, 1, dtype=torch.bfloat16), weight, row_weight,
        [(slice(n, n + 1), slice(0, 1)) for n in range(count)], torch.zeros(count, dtype=torch.long),
        lambda span: [torch.ones(1, dtype=torch.bool)], row_losses, 1,
    )  # fmt: skip
    loss.backward()
    assert weight.grad.item() == 2


@pytest.mark.parametrize("name", ["eagle3", "eagle1"])
def test_no_tensor_of_a_step_grows_with_tokens_and_vocabulary(name, monkeypatch):
    """A whole step, forward and backward: one chunk of logits exists at a time."""
    vocab, length = 1 << 14, 400
    monkeypatch.setattr(cases, "VOCAB", vocab)
    monkeypatch.setitem(cases.NUMBERS, "vocab_size", vocab)
    case = eagle3(vocab) if name == "eagle3" else eagle()
    draft, objective = case.make_draft(), case.make_objective()
    batch, supervision = lay_out([make_documents([length], seed) for seed in range(3)], length)
    with LargestTensor() as mode:
        schedule = objective.schedule(batch)
        objective.loss(draft, schedule, supervision, schedule.counts).loss.backward()
    assert sum(int(part.supervised.sum()) for part in schedule.chunks) > 3 * length / 2
    assert mode.elements <= LOGITS_PER_CHUNK["cpu"] < batch.num_tokens * vocab / 2
