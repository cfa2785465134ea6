"""Every loss against its formula, written term by term in float64."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_speculative.algorithms.common.losses import (
    HardCrossEntropy,
    KLDivergence,
    LKAlpha,
    LKLambda,
    SoftCrossEntropy,
    TotalVariation,
)
from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.config.groups import SCHEMAS
from nemo_speculative.utils.errors import UserError


def softmax(z):
    powers = torch.exp(z - z.max())
    return powers / powers.sum()


def kl(p, q):
    terms = [p[j] * (torch.log(p[j]) - torch.log(q[j])) for j in range(len(p)) if p[j] > 0]
    return sum(terms)


def variation(p, q):
    return sum(abs(p[j] - q[j]) for j in range(len(p))) / 2


def accepted(p, q):
    return sum(torch.minimum(p[j], q[j]) for j in range(len(p)))


def tempered_kl(temperature):
    def formula(p, z):
        powers = p ** (1 / temperature)
        return temperature**2 * kl(powers / powers.sum(), softmax(z / temperature))

    return formula


def lk_lambda(eta):
    def formula(p, z):
        q = softmax(z)
        weight = math.exp(-eta * accepted(p, q).item())
        return weight * kl(p, q) + (1 - weight) * variation(p, q)

    return formula


CASES = {
    "soft_ce": (SoftCrossEntropy(), lambda p, z: -sum(p[j] * torch.log(softmax(z)[j]) for j in range(len(p)))),
    "hard_ce": (HardCrossEntropy(), lambda p, z: -torch.log(softmax(z)[int(p.argmax())])),
    "kl": (KLDivergence(), tempered_kl(1)),
    "kl at 2.5": (KLDivergence(2.5), tempered_kl(2.5)),
    "kl at 0.4": (KLDivergence(0.4), tempered_kl(0.4)),
    "tv": (TotalVariation(), lambda p, z: variation(p, softmax(z))),
    "lk_alpha": (LKAlpha(), lambda p, z: -torch.log(accepted(p, softmax(z)))),
    "lk_lambda": (LKLambda(), lk_lambda(3)),
    "lk_lambda, eta 0.7": (LKLambda(0.7), lk_lambda(0.7)),
}
LOSSES = [loss for loss, _ in CASES.values()]


def rows(n=6, size=9, seed=0, spread=2.0):
    """Logits and a target's probabilities, both float32."""
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(n, size, generator=generator)
    p = (spread * torch.randn(n, size, generator=generator)).softmax(-1)
    return z, p


@pytest.mark.parametrize(("loss", "formula"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_formulas(loss, formula, dtype):
    z, p = rows()
    p[0] = torch.eye(9)[3]  # a certain target: zeros everywhere else
    z = z.to(dtype)
    ours = z.clone().requires_grad_()
    values = loss(ours, p)
    values.sum().backward()
    exact = z.double().requires_grad_()
    expected = torch.stack([formula(row_p, row_z) for row_p, row_z in zip(p.double(), exact, strict=True)])
    expected.sum().backward()
    assert values.dtype == torch.float32 and values.shape == (6,)
    torch.testing.assert_close(values.double(), expected, atol=2e-6, rtol=2e-5)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]  # the gradient has the logits' dtype
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("loss", LOSSES, ids=CASES)
def test_the_loss_of_a_row_does_not_depend_on_other_rows(loss):
    z, p = rows()
    torch.testing.assert_close(torch.cat([loss(z[i : i + 1], p[i : i + 1]) for i in range(6)]), loss(z, p))


@pytest.mark.parametrize("loss", [TotalVariation(), KLDivergence(), KLDivergence(3.0), LKAlpha(), LKLambda()])
def test_the_loss_is_zero_for_equal_distributions_and_positive_otherwise(loss):
    z = rows()[0]
    assert loss(z, z.softmax(-1)).abs().max() < 1e-5
    assert (loss(z, rows(seed=1)[1]) > 0.01).all()


def test_acceptance_is_a_probability_and_the_losses_are_ordered():
    """0 ≤ TV = 1 - α ≤ -log α, and TV² ≤ KL / 2 (Pinsker)."""
    z, p = rows(n=500, size=17, spread=3.0)
    tv, kl_, alpha = TotalVariation()(z, p), KLDivergence()(z, p), torch.exp(-LKAlpha()(z, p))
    assert (tv >= 0).all() and (tv <= 1).all()
    torch.testing.assert_close(alpha, 1 - tv, atol=1e-5, rtol=1e-5)
    assert (LKAlpha()(z, p) >= tv - 1e-6).all() and (2 * tv**2 <= kl_ + 1e-6).all()


@pytest.mark.parametrize("loss", LOSSES, ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 2.0, 40.0])
def test_with_gradient_returns_the_gradient_of_autograd(loss, dtype, spread):
    """Of the weighted sum, with rows of weight 0, one-hot targets and logits far apart."""
    z, p = rows(n=8, spread=spread)
    p[0], z = torch.eye(9)[3], z.to(dtype)
    weight = torch.tensor([1.0, 0.0, 2.5, 1e-3, 1.0, 0.3, 7.0, 1.0])
    exact = z.clone().requires_grad_()
    expected = loss(exact, p)
    (expected * weight).sum().backward()
    with torch.no_grad():
        values, gradient = loss.with_gradient(z.clone(), p, weight, z.argmax(-1))
    assert values.dtype == torch.float32 and not values.requires_grad
    torch.testing.assert_close(values, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.to(dtype), exact.grad, atol=1e-6, rtol=1e-5 if dtype is torch.float32 else 0.01)
    assert not gradient[1].any()


def test_lk_lambda_is_kl_at_eta_zero_and_total_variation_at_infinity():
    z, p = rows()
    torch.testing.assert_close(LKLambda(0.0)(z, p), KLDivergence()(z, p))
    torch.testing.assert_close(LKLambda(1e4)(z, p), TotalVariation()(z, p))


def test_the_temperature_does_not_change_the_size_of_a_gradient_much():
    z, p = rows(n=64, size=50, spread=0.1)
    sizes = []
    for temperature in (1.0, 4.0):
        ours = z.clone().requires_grad_()
        KLDivergence(temperature)(ours, p).sum().backward()
        sizes.append(ours.grad.norm())
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def hopeless(dtype=torch.float32):
    """All mass of q where p has none: e^-400 is 0 in float32."""
    return torch.tensor([[0.0, 400.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("loss", LOSSES, ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_stays_finite_where_p_and_q_hardly_overlap(loss, dtype):
    z = hopeless(dtype)
    value = loss(z, torch.tensor([[1.0, 0.0, 1e-45, 0.0]]))
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()


def test_lk_alpha_has_a_gradient_where_the_overlap_underflows():
    z = hopeless()
    value = LKAlpha()(z, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    value.sum().backward()
    assert value.item() == pytest.approx(400)
    torch.testing.assert_close(z.grad, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]))


def test_a_low_temperature_does_not_underflow_on_a_flat_target():
    """(1/50)^100 underflows in float32; p^(1/T) normalized is uniform all the same."""
    p, z = torch.full((1, 50), 1 / 50), torch.zeros(1, 50)
    assert KLDivergence(0.01)(z, p).item() == pytest.approx(0, abs=1e-6)


NAMES = {
    "soft_ce": SoftCrossEntropy,
    "hard_ce": HardCrossEntropy,
    "kl": KLDivergence,
    "tv": TotalVariation,
    "lk_alpha": LKAlpha,
    "lk_lambda": LKLambda,
}


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=list(overrides)).draft.loss


def test_every_loss_has_a_file_and_every_file_a_loss():
    assert {file.stem for file in (CONF / "loss").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize(("name", "cls"), NAMES.items())
def test_the_group_builds_it(name, cls):
    config = composed(f"+loss={name}")
    assert OmegaConf.get_type(config) is SCHEMAS["loss"].get(name, SCHEMAS["loss"]["default"])
    assert type(instantiate(to_job(config))) is cls


def test_the_command_line_sets_its_numbers():
    assert instantiate(composed("+loss=kl", "draft.loss.temperature=2")).temperature == 2
    assert instantiate(composed("+loss=lk_lambda", "draft.loss.eta=0.5")).eta == 0.5


BAD = {
    "kl": ("draft.loss.temperature", ["0", "-1", "nan", "inf"]),
    "lk_lambda": ("draft.loss.eta", ["-1", "nan", "inf"]),
}


@pytest.mark.parametrize(("loss", "key", "value"), [(loss, key, v) for loss, (key, bad) in BAD.items() for v in bad])
def test_an_invalid_number_is_refused_by_its_key(loss, key, value):
    with pytest.raises(UserError) as error:
        to_job(composed(f"+loss={loss}", f"{key}={value}"))
    said = str(error.value)
    assert said.startswith(f"{key} is ") and "expected" in said and "\n" not in said
