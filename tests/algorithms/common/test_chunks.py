"""The sum over slot chunks, against autograd over all of them at once."""

from types import SimpleNamespace

import torch

from nemo_speculative.algorithms.common.ttt import Step0State, sum_over_chunks

LENGTH = 20


def make_chunk(reads, keys):
    return SimpleNamespace(slots=SimpleNamespace(token_window=slice(*reads), key_window=slice(*keys)))


CHUNKS = [make_chunk((0, 9), (0, 7)), make_chunk((6, 13), (0, 12)), make_chunk((14, 20), (13, 20))]


def drawn():
    random = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    pairs = tuple((tensor(2, LENGTH, 3), tensor(2, LENGTH, 3)) for _ in range(2))
    return Step0State(tensor(LENGTH, 4), tensor(LENGTH, 3), pairs), [tensor(3, 4), tensor(3), tensor(5)]


def loss_with(weights):
    """A loss that is nonlinear in each tensor of the state and in every weight but the last, which it does not use."""

    def loss(window, _):
        joined = torch.tanh(window.last_input @ weights[0] * window.tokens).sum()
        for k, v in window.keys_values:
            joined = joined + (k.exp() * v * weights[1]).sum()
        return joined, {"tokens": torch.tensor(float(len(window.tokens)))}

    return loss


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def test_loss_sums_and_gradients_equal_those_of_all_chunks_at_once():
    state, weights = drawn()
    loss = loss_with(weights)
    tensors = [*state.tensors(), *weights]
    expected = torch.stack([loss(state.window(p.slots), p)[0] for p in CHUNKS]).sum()
    found, sums = sum_over_chunks(loss, state, CHUNKS, weights)
    torch.testing.assert_close(found, expected)
    assert float(sums["tokens"]) == 9 + 7 + 6
    # Operations after the sum count as well.
    for ours, theirs in zip(gradients(3 * found, tensors), gradients(3 * expected, tensors), strict=True):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs)


def test_gradients_reach_what_the_step0_state_was_computed_from():
    """The state is computed from another weight, whose graph is kept."""
    state, weights = drawn()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = loss_with(weights)

    def scaled():
        return state.map(lambda x: x * scale)

    whole = scaled()
    expected = torch.stack([loss(whole.window(p.slots), p)[0] for p in CHUNKS]).sum()
    found, _ = sum_over_chunks(loss, scaled(), CHUNKS, weights)
    torch.testing.assert_close(gradients(found, [scale]), gradients(expected, [scale]))


def test_a_frozen_tensor_gets_no_gradient_and_without_gradients_the_loss_is_the_same():
    state, weights = drawn()
    state.last_input.requires_grad_(False)
    found, _ = sum_over_chunks(loss_with(weights), state, CHUNKS, weights)
    found.backward()
    assert state.last_input.grad is None and state.tokens.grad is not None
    with torch.no_grad():
        again, sums = sum_over_chunks(loss_with(weights), state, CHUNKS, weights)
    assert not again.requires_grad and float(sums["tokens"]) == 22
    torch.testing.assert_close(again, found.detach())


def test_many_small_gradients_add_up_in_bfloat16():
    """Next to 1, bfloat16 has steps of 2^-7: added one by one, 128 chunks of 2^-9 would vanish."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    state = Step0State(x, x, ((x[None], x[None]),))
    chunks = [make_chunk((0, 1), (0, 1)) for _ in range(129)]
    share = {id(p): 1.0 if n == 0 else 2**-9 for n, p in enumerate(chunks)}
    found, _ = sum_over_chunks(lambda _, p: ((weight * share[id(p)]).sum(), {"n": x.sum()}), state, chunks, [weight])
    found.backward()
    assert weight.grad.dtype == torch.bfloat16 and float(weight.grad) == 1.25
