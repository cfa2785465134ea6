import math

import pytest
import torch

from nemo_speculative.config.schema import DecayType, OptimizerConfig
from nemo_speculative.training.optimization import build_optimizers, build_schedules


def curve(config, steps):
    """The learning rate that each step uses."""
    optimizers = build_optimizers(config, torch.nn.Linear(2, 2))
    schedules, rates = build_schedules(config, optimizers, steps), []
    for _ in range(steps):
        rates.append(optimizers.optimizers[0].param_groups[0]["lr"])
        optimizers.step()
        schedules.step()
    return rates


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_rises_linearly_then_falls_to_the_end(decay):
    steps, warmup, lr = 100, 10, 3e-3
    rates = curve(OptimizerConfig(lr=lr, warmup_ratio=0.1, decay_type=DecayType(decay)), steps)
    assert rates[:warmup] == pytest.approx([lr * (i + 1) / warmup for i in range(warmup)])
    for i in range(warmup + 1, steps):
        done = (i - warmup) / (steps - warmup)
        expected = 1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        assert rates[i] == pytest.approx(lr * expected, abs=0.03 * lr)
    assert max(rates) == pytest.approx(lr) and rates[-1] < 0.03 * lr


def test_keeps_a_floor_and_a_plateau():
    rates = curve(OptimizerConfig(lr=1.0, warmup_ratio=0.1, decay_ratio=0.5, min_lr_factor=0.1), 100)
    assert rates[12:50] == [1.0] * 38
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_train_at_all(steps):
    rates = curve(OptimizerConfig(lr=1.0), steps)
    assert max(rates) > 0.4


def test_steps_as_torchs_own_adamw_does():
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = build_optimizers(config, ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(4, 3)
        for model, optimizer in ((ours, optimizers), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
