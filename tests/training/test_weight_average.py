"""The moving average of the weights: its formula, its use in place of the weights, and its resume."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_speculative.training.optimizer import WeightAverage
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Small(nn.Module):
    """A matrix, a vector, a frozen weight and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.register_buffer("d2t", torch.arange(3))

    def forward(self, x):
        return self.frozen(self.layer(x))


def move(model, step):
    """Stands for an optimizer step: sets the weights to values that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            value = torch.randn(p.shape, generator=generator)
            if p.requires_grad:
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)


def averaged(decay, steps):
    """The formula in float64."""
    model = Small()
    average = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for n in range(1, steps + 1):
        move(model, n)
        d = min(decay, (1 + n) / (10 + n))
        for name in average:
            average[name] = d * average[name] + (1 - d) * dict(model.named_parameters())[name].detach().double()
    return average


def run(decay, steps):
    model = Small()
    average = WeightAverage(model, decay)
    for n in range(1, steps + 1):
        move(model, n)
        average.update(n)
    return model, average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_average_follows_the_formula(decay, steps):
    state = run(decay, steps)[1].state_dict()
    expected = averaged(decay, steps)
    assert state.keys() == expected.keys() == {"layer.weight", "layer.bias"}
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, atol=1e-6, rtol=1e-6)


def test_average_of_bfloat16_weights_is_float32():
    model = Small().to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    for n in range(1, 200):
        with torch.no_grad():
            model.layer.weight.fill_(1 + 2**-7 * (n % 2))  # bfloat16 has nothing between the two
        average.update(n)
    weight = average.state_dict()["layer.weight"]
    assert weight.dtype == torch.float32 and (weight > 1.001).all() and (weight < 1.007).all()


def test_applied_replaces_the_weights_and_restores_them():
    model, average = run(0.9, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied():
        within = get_model_state_dict(model, options=FULL)
        for name, value in averaged(0.9, 5).items():
            torch.testing.assert_close(within[name].double(), value, atol=1e-6, rtol=1e-6)
        assert torch.equal(within["frozen.weight"], before["frozen.weight"])
        assert torch.equal(within["d2t"], before["d2t"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_applied_restores_the_weights_after_an_error():
    model, average = run(0.9, 5)
    before = model.layer.weight.detach().clone()
    with pytest.raises(OSError), average.applied():
        raise OSError
    assert torch.equal(model.layer.weight, before)


def test_without_decay_the_average_is_empty(tmp_path):
    model, average = run(None, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied():
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert average.state_dict() == {}
    dcp.save({"ema": average, "other": torch.ones(1)}, checkpoint_id=tmp_path / "state", no_dist=True)
    dcp.load({"ema": average, "other": torch.ones(1)}, checkpoint_id=tmp_path / "state", no_dist=True)


def test_load_copies_the_tensors():
    average, loaded = run(0.9, 1)[1], {"layer.weight": torch.ones(5, 6), "layer.bias": torch.zeros(5)}
    average.load_state_dict(loaded)
    loaded["layer.weight"].zero_()
    assert average.state_dict()["layer.weight"].eq(1).all() and average.state_dict()["layer.bias"].eq(0).all()


def test_loading_an_incomplete_average_is_an_error():
    average = run(0.9, 1)[1]
    with pytest.raises(KeyError, match=r"layer\.bias"):
        average.load_state_dict({"layer.weight": torch.zeros(5, 6)})


def two_rank_results(folder):
    """Six updates; three, a checkpoint, and three more after it; and a forward pass with the average applied."""
    straight, first, second = sharded_run(), sharded_run(), sharded_run()
    advance(straight, 1, 6)
    advance(first, 1, 3)
    dcp.save({"ema": first[1]}, checkpoint_id=folder)
    dcp.load({"ema": second[1]}, checkpoint_id=folder)
    advance(second, 4, 6)
    model, average = straight
    with average.applied():
        exported = get_model_state_dict(model, options=FULL)
    x = torch.ones(2, 6)
    with torch.no_grad():
        plain = model(x)  # leaves the weights gathered
        with average.applied():
            within = model(x)
        after = model(x)
    return {
        "straight": {name: value.full_tensor() for name, value in average.state_dict().items()},
        "resumed": {name: value.full_tensor() for name, value in second[1].state_dict().items()},
        "local": sum(value.to_local().numel() for value in average.state_dict().values()),
        "exported": exported,
        "outputs": [plain, within, after],
    }


def sharded_run():
    model = Small()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model, WeightAverage(model, 0.9)


def advance(run, first, last):
    for n in range(first, last + 1):
        move(run[0], n)
        run[1].update(n)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks") / "state"
    return folder, on_ranks(2, two_rank_results, str(folder))


def test_two_ranks_compute_the_average_of_one_and_hold_half_each(two_ranks):
    expected = run(0.9, 6)[1].state_dict()
    ranks = two_ranks[1]
    for rank in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(rank["straight"][name], value)
    assert sum(rank["local"] for rank in ranks) == 5 * 6 + 5


def test_a_resumed_average_is_identical(two_ranks):
    for rank in two_ranks[1]:
        assert all(torch.equal(value, rank["resumed"][name]) for name, value in rank["straight"].items())


def test_an_average_of_two_ranks_resumes_on_one(two_ranks):
    average = WeightAverage(Small(), 0.9)
    dcp.load({"ema": average}, checkpoint_id=two_ranks[0], no_dist=True)
    for name, value in run(0.9, 3)[1].state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value)


def test_the_exported_weights_are_the_average(two_ranks):
    first = two_ranks[1][0]
    for name in ("layer.weight", "layer.bias"):
        assert torch.equal(first["exported"][name], first["straight"][name])
    assert torch.equal(first["exported"]["d2t"], torch.arange(3))


def test_a_forward_pass_uses_the_current_weights(two_ranks):
    """FSDP2 keeps gathered weights after a forward pass without a backward: they must not outlive a change."""
    for rank in two_ranks[1]:
        plain, within, after = rank["outputs"]
        expected = Small()
        with torch.no_grad():
            for name, value in rank["straight"].items():
                dict(expected.named_parameters())[name].copy_(value)
            torch.testing.assert_close(within, expected(torch.ones(2, 6)))
        assert torch.equal(plain, after) and not torch.allclose(plain, within)
