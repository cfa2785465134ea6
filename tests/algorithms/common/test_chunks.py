"""A sum over parts, against autograd over all of them at once."""

from types import SimpleNamespace

import torch

from nemo_speculative.algorithms.common.ttt import Step0State, sum_over_chunks

LENGTH = 20


def part(reads, keys):
    return SimpleNamespace(slots=SimpleNamespace(token_window=slice(*reads), key_window=slice(*keys)))


PARTS = [part((0, 9), (0, 7)), part((6, 13), (0, 12)), part((14, 20), (13, 20))]


def drawn(below=True):
    random = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    pairs = tuple((tensor(2, LENGTH, 3), tensor(2, LENGTH, 3)) for _ in range(2))
    prefix = Step0State(tensor(LENGTH, 4), tensor(LENGTH, 3), pairs, tensor(LENGTH, 3) if below else None)
    return prefix, [tensor(3, 4), tensor(3), tensor(5)]


def loss_with(weights):
    """Of the last weight nothing; of the others and of each tensor of the prefix something that is not linear."""

    def loss(seen, _):
        joined = torch.tanh(seen.features @ weights[0] * seen.tokens).sum()
        for k, v in seen.keys_values:
            joined = joined + (k.exp() * v * weights[1]).sum()
        if seen.last_input is not None:
            joined = joined + (seen.last_input.square() @ weights[1]).sum()
        return joined, {"tokens": torch.tensor(float(len(seen.tokens)))}

    return loss


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def test_loss_sums_and_gradients_are_those_of_all_parts_at_once():
    for below in (True, False):
        prefix, weights = drawn(below)
        loss = loss_with(weights)
        tensors = [*prefix.tensors(), *weights]
        expected = torch.stack([loss(prefix.window(p.slots), p)[0] for p in PARTS]).sum()
        found, sums = sum_over_chunks(loss, prefix, PARTS, weights)
        torch.testing.assert_close(found, expected)
        assert float(sums["tokens"]) == 9 + 7 + 6
        # What is behind the sum counts as well.
        for ours, theirs in zip(gradients(3 * found, tensors), gradients(3 * expected, tensors), strict=True):
            assert (ours is None) == (theirs is None)
            torch.testing.assert_close(ours, theirs)


def test_what_lies_in_front_of_the_prefix_is_trained():
    """The prefix is made of other weights, whose graph stays."""
    prefix, weights = drawn()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = loss_with(weights)

    def scaled():
        return prefix.map(lambda x: x * scale)

    whole = scaled()
    expected = torch.stack([loss(whole.window(p.slots), p)[0] for p in PARTS]).sum()
    found, _ = sum_over_chunks(loss, scaled(), PARTS, weights)
    torch.testing.assert_close(gradients(found, [scale]), gradients(expected, [scale]))


def test_a_frozen_tensor_gets_no_gradient_and_without_gradients_the_loss_is_the_same():
    prefix, weights = drawn()
    prefix.features.requires_grad_(False)
    found, _ = sum_over_chunks(loss_with(weights), prefix, PARTS, weights)
    found.backward()
    assert prefix.features.grad is None and prefix.tokens.grad is not None
    with torch.no_grad():
        again, sums = sum_over_chunks(loss_with(weights), prefix, PARTS, weights)
    assert not again.requires_grad and float(sums["tokens"]) == 22
    torch.testing.assert_close(again, found.detach())


def test_many_small_gradients_add_up_in_bfloat16():
    """Next to 1, bfloat16 has steps of 2^-7: one after the other, 128 parts of 2^-9 would leave nothing."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    prefix = Step0State(x, x, ((x[None], x[None]),), None)
    parts = [part((0, 1), (0, 1)) for _ in range(129)]
    share = {id(p): 1.0 if n == 0 else 2**-9 for n, p in enumerate(parts)}
    found, _ = sum_over_chunks(lambda _, p: ((weight * share[id(p)]).sum(), {"n": x.sum()}), prefix, parts, [weight])
    found.backward()
    assert weight.grad.dtype == torch.bfloat16 and float(weight.grad) == 1.25
