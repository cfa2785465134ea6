"""Optimizers and schedules: against torch's own and closed forms, on one and two ranks, and from the configuration."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hydra import compose, initialize_config_dir
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.config.schema import DecayType, MuonConfig, OptimizerConfig
from nemo_speculative.distributed import titan
from nemo_speculative.training.optimizer import build_optimizers, build_schedules
from nemo_speculative.utils.errors import UserError
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:To get the last learning")
CONFIGS = {"adamw": OptimizerConfig, "muon": MuonConfig}


def curve(config, steps):
    """Learning rates of all steps, one list per optimizer."""
    optimizers = build_optimizers(config, nn.Linear(2, 2))
    schedules, rates = build_schedules(config, optimizers, steps), []
    for _ in range(steps):
        rates.append([o.param_groups[0]["lr"] for o in optimizers])
        optimizers.step()
        schedules.step()
    return list(zip(*rates, strict=True))


FALLING = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "sqrt": lambda done: 1 - math.sqrt(done),
    "constant": lambda done: 1,
}


@pytest.mark.parametrize("decay", FALLING)
@pytest.mark.parametrize("name", CONFIGS)
def test_schedule_warms_up_linearly_then_decays_to_the_end(name, decay):
    steps, warmup, lr = 100, 10, 3e-3
    curves = curve(CONFIGS[name](lr=lr, warmup_ratio=0.1, decay_type=DecayType(decay)), steps)
    assert len(curves) == {"adamw": 1, "muon": 2}[name]
    for rates in curves:
        assert rates[:warmup] == pytest.approx([lr * (i + 1) / warmup for i in range(warmup)])
        # From the second step of the decay: torchtitan counts one step more, so that the last is not lost on zero.
        expected = [lr * FALLING[decay]((i - warmup) / (steps - warmup)) for i in range(warmup + 1, steps)]
        assert rates[warmup + 1 :] == pytest.approx(expected, abs=1e-9)


def test_muon_lr_follows_the_same_schedule():
    matrices, rest = curve(MuonConfig(lr=1e-3, muon_lr=5e-3, warmup_ratio=0.1), 20)
    assert matrices == pytest.approx([5 * rate for rate in rest])


def test_schedule_has_a_plateau_and_a_floor():
    (rates,) = curve(OptimizerConfig(lr=1.0, warmup_ratio=0.1, decay_ratio=0.5, min_lr_factor=0.1), 100)
    assert rates[12:50] == (1.0,) * 38
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_reach_a_useful_learning_rate(steps):
    (rates,) = curve(OptimizerConfig(lr=1.0), steps)
    assert max(rates) > 0.4


def trained(model, optimizer, steps=5):
    """``model`` after ``steps`` steps on data that depend on the step alone."""
    for step in range(steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Small(nn.Module):
    """A wide and a tall hidden matrix, and one parameter of each other kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.wide = nn.Linear(12, 21, bias=False), nn.Linear(21, 7)
        self.norm = nn.RMSNorm(7)
        self.lm_head = nn.Linear(7, 5, bias=False)
        self.embed_tokens = nn.Embedding(3, 7)

    def forward(self, x):
        table = self.embed_tokens(torch.arange(3)).sum(0)
        return self.lm_head(self.norm(self.wide(self.tall(x).tanh())) + table)


def test_adamw_matches_torchs_adamw():
    ours, other = Small(), Small()
    result = trained(ours, build_optimizers(OptimizerConfig(lr=0.01, weight_decay=0.1), ours))
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for name, expected in trained(other, reference).items():
        torch.testing.assert_close(result[name], expected, msg=name)


def newton_schulz(matrix, steps=5):
    """Muon's quintic iteration applied to the singular values, in float64."""
    u, values, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ torch.diag(values) @ v


def test_muon_moves_matrices_along_their_orthogonalized_momentum():
    config = MuonConfig(lr=0.01, muon_lr=0.02, weight_decay=0.1, momentum=0.9)
    model = Small()
    optimizers = build_optimizers(config, model)
    momentum = {name: torch.zeros_like(getattr(model, name).weight) for name in ("tall", "wide")}
    for step in range(4):
        before = {name: getattr(model, name).weight.detach().clone() for name in momentum}
        optimizers.zero_grad()
        model(torch.randn(16, 12, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizers.step()
        for name in momentum:
            weight = getattr(model, name).weight
            momentum[name] = 0.9 * momentum[name] + 0.1 * weight.grad
            direction = newton_schulz(0.9 * momentum[name] + 0.1 * weight.grad)
            scale = 0.2 * math.sqrt(max(weight.shape))
            moved = (weight.detach() - (1 - 0.02 * 0.1) * before[name]) / (-0.02 * scale)
            # bfloat16 inside; an entry of the direction is of the order of 0.3 here.
            torch.testing.assert_close(moved.double(), direction, atol=0.03, rtol=0.03)


def test_muon_leaves_norms_biases_embedding_and_head_to_adamw():
    ours, other = Small(), Small()
    optimizers = build_optimizers(MuonConfig(lr=0.01, weight_decay=0.1), ours)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    result, expected = trained(ours, optimizers, 1), trained(other, reference, 1)
    for name in ("wide.bias", "norm.weight", "lm_head.weight", "embed_tokens.weight"):
        torch.testing.assert_close(result[name], expected[name], msg=name)
    for name in ("tall.weight", "wide.weight"):
        assert (result[name] - expected[name]).abs().max() > 1e-3, name


SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "vocab_size": 20,
    "rms_norm_eps": 1e-6, "max_positions": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: EagleDraft(EagleShape(**SIZES, num_layers=2)),
        lambda: Eagle3Draft(
            Eagle3Shape(**SIZES, draft_vocab_size=10, aux_layers=(1, 2, 3), target_hidden_size=12, fc_norm=True)
        ),
    ],
)
def test_muon_trains_exactly_the_hidden_matrices_of_a_draft(make):
    draft = make()
    by_muon, by_adamw = build_optimizers(MuonConfig(), draft)
    names = [name for group in by_muon.param_groups for name in group["param_names"]]
    layers = draft.shape.num_layers
    assert sorted(name.split(".")[-2] for name in names) == sorted([*LAYER] * layers + ["fc"])
    assert {name.split(".")[-1] for name in names} == {"weight"}
    assert len(names) + len(by_adamw.param_groups[0]["params"]) == len(list(draft.parameters()))


def test_a_model_of_matrices_alone_trains_with_muon():
    optimizers = build_optimizers(MuonConfig(), nn.Linear(4, 4, bias=False))
    assert [type(o) for o in optimizers] == [torch.optim.Muon]


# --- several ranks


def sharded(config):
    """Small, sharded as the trainer shards a draft: gradients are summed."""
    model = Small()
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
        titan.disable_fsdp_gradient_division(model)
        model.set_force_sum_reduction_for_comms(True)
    optimizers = build_optimizers(config, model)
    return model, optimizers, build_schedules(config, optimizers, 10)


def take_steps(run, first, last):
    """Runs optimizer steps; every rank's loss is an equal part of the total."""
    model, optimizers, schedules = run
    parts = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(first, last):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        (model(x).square().sum() / parts).backward()
        optimizers.step()
        schedules.step()
        optimizers.zero_grad()


def full_tensors(tensors):
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in tensors.items()}


def states(run):
    model, optimizers, schedules = run
    return {**titan.ModelWrapper(model).state_dict(), "optimizer": optimizers, "lr_scheduler": schedules}


def one_rank_weights(config, steps):
    run = sharded(config)
    take_steps(run, 0, steps)
    return full_tensors(dict(run[0].named_parameters()))


def two_rank_results(config, folder):
    """Six steps; and three, a checkpoint, and three more of a run that resumes from it."""
    straight, first, second = sharded(config), sharded(config), sharded(config)
    take_steps(straight, 0, 6)
    take_steps(first, 0, 3)
    dcp.save(states(first), checkpoint_id=folder)
    state = states(second)
    dcp.load(state, checkpoint_id=folder)
    titan.ModelWrapper(second[0]).load_state_dict(state)
    take_steps(second, 3, 6)
    buffers = [s["momentum_buffer"] for o in straight[1] for s in o.state.values() if "momentum_buffer" in s]
    return {
        "straight": full_tensors(dict(straight[0].named_parameters())),
        "resumed": full_tensors(dict(second[0].named_parameters())),
        "stored": [b.to_local().untyped_storage().nbytes() for b in buffers],
        "whole": [b.numel() * 4 for b in buffers],
        "gradients": [p.grad is None for p in straight[0].parameters()],
    }


def both_optimizers(folder):
    return {name: two_rank_results(config(lr=0.01), f"{folder}/{name}") for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    return folder, on_ranks(2, both_optimizers, str(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_give_the_weights_of_one(two_ranks, name):
    expected = one_rank_weights(CONFIGS[name](lr=0.01), 6)
    for rank in two_ranks[1]:
        for key, value in rank[name]["straight"].items():
            torch.testing.assert_close(value, expected[key], msg=key, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_is_identical(two_ranks, name):
    for rank in two_ranks[1]:
        for key, value in rank[name]["straight"].items():
            assert torch.equal(value, rank[name]["resumed"][key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_two_ranks_resumes_on_one(two_ranks, name):
    folder, ranks = two_ranks
    run = sharded(CONFIGS[name](lr=0.01))
    state = states(run)
    dcp.load(state, checkpoint_id=f"{folder}/{name}", no_dist=True)
    titan.ModelWrapper(run[0]).load_state_dict(state)
    take_steps(run, 3, 6)
    for key, value in run[0].named_parameters():
        torch.testing.assert_close(value.detach(), ranks[0][name]["straight"][key], msg=key, atol=1e-7, rtol=1e-6)


def test_between_steps_a_rank_holds_only_its_shard_of_the_momentum(two_ranks):
    ranks = [rank["muon"] for rank in two_ranks[1]]
    assert len(ranks[0]["whole"]) == 2
    for first, second, total in zip(ranks[0]["stored"], ranks[1]["stored"], ranks[0]["whole"], strict=True):
        assert first + second == total


# --- the configuration


@pytest.mark.parametrize(("name", "cls"), CONFIGS.items())
def test_each_config_group_builds_its_optimizer(name, cls):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_job(compose(overrides=[f"+optimizer={name}", "optimizer.decay_type=constant"]).optimizer)
    assert type(config) is cls and config.decay_type is DecayType.constant
    assert build_optimizers(config, nn.Linear(2, 2)).optimizers[0].__class__.__name__.lower() == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(MuonConfig, muon_lr=0.0), "optimizer.muon_lr is 0.0"),
        (functools.partial(MuonConfig, momentum=1.0), "optimizer.momentum is 1.0"),
        (functools.partial(MuonConfig, lr=-1.0), "optimizer.lr is -1.0"),
        (functools.partial(OptimizerConfig, min_lr_factor=2.0), "optimizer.min_lr_factor is 2.0"),
        (functools.partial(OptimizerConfig, ema_decay=1.0), "optimizer.ema_decay is 1.0"),
        (functools.partial(OptimizerConfig, ema_decay=-0.1), "optimizer.ema_decay is -0.1"),
        (
            functools.partial(OptimizerConfig, decay_type=DecayType.constant, min_lr_factor=0.1),
            "optimizer.decay_type=constant",
        ),
    ],
)
def test_an_invalid_value_is_rejected_by_name(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)
