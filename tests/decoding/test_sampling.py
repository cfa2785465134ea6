import math

import pytest
import torch

from nemo_speculative.decoding.verify import Sampling, draw, draw_distinct, inverse_transform
from nemo_speculative.utils.errors import UserError
from tests.decoding.statistics import chi_square_p

LOGITS = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)) * 2


def naive(logits, temperature, top_p, top_k):
    """Reference: one distribution, one token at a time, in Python floats."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[: top_k or len(order)]
    total, held, chosen = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if held >= top_p:
            break
        chosen.append(i)
        held += weights[i] / total
    total = sum(weights[i] for i in chosen)
    return [weights[i] / total if i in chosen else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p, top_k", [(1, 0), (0.6, 0), (1, 3), (0.6, 3), (1e-6, 0), (1, 1), (0.9, 50)])
def test_probabilities_by_hand(temperature, top_p, top_k):
    result = Sampling(temperature, top_p, top_k).probabilities(LOGITS)
    expected = [naive(row, temperature, top_p, top_k) for row in LOGITS.tolist()]
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_temperature_0_and_a_tiny_one_are_the_argmax():
    best = torch.zeros_like(LOGITS).scatter(1, LOGITS.argmax(1, keepdim=True), 1.0)
    assert torch.equal(Sampling().probabilities(LOGITS), best)
    assert torch.equal(Sampling(1e-30).probabilities(LOGITS * 1e4), best)
    assert Sampling(1.0).probabilities(LOGITS.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_draws_have_the_distribution():
    p = Sampling(1.0, top_k=6).probabilities(LOGITS[0])
    drawn = draw(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert chi_square_p(torch.bincount(drawn, minlength=11), p) > 1e-3


def test_distinct_draws_are_successive_draws_without_replacement():
    """Each ordered pair: p(a) * p(b) / (1 - p(a)), from drawing twice without replacement."""
    p = Sampling(1.0).probabilities(LOGITS[1, :5])
    drawn = draw_distinct(p.expand(20_000, -1), 2, torch.Generator().manual_seed(0))
    exact = p[:, None] * p / (1 - p[:, None])
    exact.fill_diagonal_(0)
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    assert chi_square_p(counts, exact.flatten()) > 1e-3


def test_tokens_without_probability_come_last():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5]).expand(100, -1)
    drawn = draw_distinct(p, 4, torch.Generator().manual_seed(0))
    assert set(drawn[:, :2].flatten().tolist()) == {1, 3} and set(drawn[:, 2:].flatten().tolist()) == {0, 2}


def test_inverse_transform_draws_in_proportion_to_probability():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = inverse_transform(p.expand(1000, -1), grid)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform):
    p = torch.rand(20, 151_000).softmax(-1)
    p[:, :7] = p[:, -9:] = 0
    drawn = inverse_transform(p, torch.full((20,), uniform, dtype=torch.float64))
    assert (p[torch.arange(20), drawn] > 0).all()
