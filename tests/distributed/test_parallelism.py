"""How a draft lies on several ranks changes nothing that it learns, and no more is exchanged than has to be."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.collectives import FIRST_RANK_TIMEOUT, waiting_group
from nemo_speculative.distributed.parallelism import (
    check_restarts,
    context,
    data_rank,
    exchange,
    gather_ahead,
    limit_waits,
    mesh,
    process_group,
    shard_draft,
)
from nemo_speculative.targets.sharded import ShardedTarget
from nemo_speculative.targets.tensor_parallel import TensorParallelTarget
from nemo_speculative.training.build import check_sharing
from nemo_speculative.training.trainer import Trainee
from nemo_speculative.utils.errors import UserError
from tests.algorithms.objectives.cases import eagle, eagle3, lay_out, make_documents
from tests.training.ranks import on_ranks

CASES = {"eagle3": eagle3(draft_vocab=15), "eagle1": eagle(num_steps=2)}
FSDP2, DDP = {"shard": -1}, {"replicate": -1}
LAYOUTS = {
    1: {"single": {}, "offloaded": {"offload": True}},
    2: {"fsdp2": FSDP2, "ddp": DDP, "offloaded": FSDP2 | {"offload": True}, "cp": {"context": 2}},
    4: {
        "fsdp2": FSDP2,
        "ddp": DDP,
        "hsdp": {"replicate": -1, "shard": 2},
        "fsdp2 over cp": FSDP2 | {"context": 2},
        "ddp over cp": DDP | {"context": 2},
    },
}
ROWS = [[[14, 9], [21, 5]], [[30], [11, 11]], [[8, 8, 8], [25]], [[17, 12], [26]]]
"""Lengths of documents: of eight rows of 32 tokens, in pairs."""


class Exchanges(TorchDispatchMode):
    """Counts the collectives that it sees."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            name = function.name().split("::")[1].split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def rows():
    """A global batch of eight rows, whose documents differ in their number of supervised tokens."""
    return [[make_documents(lengths, seed=n)] for n, lengths in enumerate(row for pair in ROWS for row in pair)]


def one_step(case, config, dtype=torch.float32):
    """Loss and whole gradient of the global batch, and what was exchanged for it."""
    dims = mesh(ParallelismConfig(**config))
    alone, goal = case.make_objective(), case.make_objective(context=context(dims))
    trainee = shard_draft(Trainee(case.make_draft(), goal), dims, dtype, config.get("offload", False))
    rank, ranks = data_rank(dims)
    torch.manual_seed(0)
    made = [lay_out(layout, 32) for layout in rows()]
    counts = sum(alone.schedule(batch).counts for batch, _ in made)
    mine = [(goal.schedule(batch), supervision) for batch, supervision in made[rank::ranks]]
    loss = torch.zeros(())
    with Exchanges() as exchanged:
        gather_ahead(trainee)
        for n, (schedule, supervision) in enumerate(mine):
            exchange(trainee, last=n + 1 == len(mine))
            out = trainee(schedule, supervision.of(schedule.batch.share), counts)
            out.loss.backward()
            loss += out.loss.detach()
    norm = titan.clip_grad_norm_(trainee.parameters(), 1e9)
    dist.all_reduce(loss)
    gradients = {n.removeprefix("draft."): whole(p.grad).clone() for n, p in trainee.named_parameters()}
    shards = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in trainee.parameters())
    return {"loss": loss, "norm": whole(norm), "gradients": gradients, "shards": shards, "exchanged": exchanged.counts}


def whole(x):
    return getattr(x, "full_tensor", lambda: x)().detach()


def all_layouts():
    layouts = LAYOUTS[dist.get_world_size()]
    titan.bind_device("cpu")
    found = {f"{case}, {name}": one_step(CASES[case], config) for case in CASES for name, config in layouts.items()}
    whole_rows = [name for name in layouts if "context" not in layouts[name]]
    return found | {
        f"bfloat16, {name}": one_step(CASES["eagle3"], layouts[name], torch.bfloat16) for name in whole_rows
    }


@pytest.fixture(scope="module")
def found():
    """What the first rank found, by the number of ranks."""
    return {ranks: on_ranks(ranks, all_layouts)[0] for ranks in LAYOUTS}


WHICH = [
    (ranks, case, name)
    for ranks, layouts in LAYOUTS.items()
    for case in (*CASES, "bfloat16")
    for name, config in layouts.items()
    # Of a part of a row bfloat16 gives another gradient, by a rounding.
    if case != "bfloat16" or "context" not in config
]


@pytest.mark.parametrize("ranks, case, layout", WHICH)
def test_loss_and_gradients_are_those_of_one_rank(found, ranks, case, layout):
    one, many = found[1][f"{case}, single"], found[ranks][f"{case}, {layout}"]
    torch.testing.assert_close(many["loss"], one["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(many["norm"], one["norm"], rtol=1e-6, atol=0)
    for name, expected in one["gradients"].items():
        error = (many["gradients"][name] - expected).abs().max()
        assert error <= 1e-6 * max(expected.abs().max(), one["norm"] * 1e-2), name


def test_bfloat16_is_what_is_computed_in(found):
    assert found[1]["bfloat16, single"]["loss"] != found[1]["eagle3, single"]["loss"]


@pytest.mark.parametrize("ranks, layout, share", [(2, "fsdp2", 2), (2, "ddp", 1), (4, "fsdp2", 4), (4, "hsdp", 2)])
def test_a_rank_holds_its_share_of_the_draft(found, ranks, layout, share):
    whole_draft = found[1]["eagle3, single"]["shards"]
    assert found[ranks][f"eagle3, {layout}"]["shards"] == pytest.approx(whole_draft / share, rel=0.05)


@pytest.mark.parametrize("ranks, layout, replicas", [(2, "fsdp2", 0), (4, "fsdp2", 0), (4, "hsdp", 1), (4, "ddp", 1)])
def test_a_step_of_several_micro_batches_gathers_and_reduces_once(found, ranks, layout, replicas):
    exchanged, sharded = found[ranks][f"eagle3, {layout}"]["exchanged"], int(layout != "ddp")
    gathered = sum(count for name, count in exchanged.items() if "allgather" in name or "all_gather" in name)
    scattered = sum(count for name, count in exchanged.items() if "reduce_scatter" in name)
    reduced = sum(count for name, count in exchanged.items() if "allreduce" in name or "all_reduce" in name)
    assert (gathered, scattered, reduced) == (sharded, sharded, replicas), exchanged


@pytest.mark.parametrize(
    "config, ranks, sizes",
    [
        ({}, 1, (1, 1)),
        (FSDP2, 8, (1, 8)),
        (DDP, 8, (8, 1)),
        ({"replicate": -1, "shard": 8}, 64, (8, 8)),
        ({"shard": -1, "context": 4}, 16, (1, 4)),
        ({"replicate": 2, "shard": -1, "context": 2}, 16, (2, 4)),
    ],
)
def test_what_is_left_open_is_what_the_others_leave(config, ranks, sizes):
    assert ParallelismConfig(**config).sizes(ranks) == sizes


@pytest.mark.parametrize(
    "config, ranks", [({}, 2), ({"shard": 3}, 4), ({"replicate": -1, "shard": 8}, 4), ({"context": 2, "shard": -1}, 3)]
)
def test_sizes_that_do_not_multiply_to_the_ranks_are_refused(config, ranks):
    with pytest.raises(UserError, match=rf"parallelism: replicate=.*do not multiply to the {ranks} process"):
        ParallelismConfig(**config).sizes(ranks)


def test_only_one_size_can_be_left_open():
    with pytest.raises(UserError, match=r"parallelism.replicate and parallelism.shard are both -1"):
        ParallelismConfig(replicate=-1, shard=-1)


@pytest.mark.parametrize("ranks, config", [(64, {"replicate": -1, "shard": 8}), (512, {"shard": -1, "context": 8})])
def test_ranks_that_share_rows_are_neighbours(ranks, config, fake_ranks):
    """torch's fake backend: a mesh of any size in one process."""
    seen = []
    for rank in (0, 1, 7, 8, ranks - 1):
        fake_ranks(rank, ranks)
        dims = mesh(ParallelismConfig(**config))
        seen.append(data_rank(dims))
        names = ["dp_replicate", "fsdp"] if dims.dp_replicate > 1 else ["fsdp"]
        assert [dims.get_mesh(name).size() for name in names] == ([8, 8] if ranks == 64 else [512])
    context = config.get("context", 1)
    assert seen == [(rank // context, ranks // context) for rank in (0, 1, 7, 8, ranks - 1)]


@pytest.mark.parametrize("rope_type, refused", [("yarn", False), ("dynamic", True), ("longrope", True)])
@pytest.mark.parametrize("nested", [False, True])
def test_frequencies_that_follow_the_longest_position_are_refused_where_ranks_share_rows(rope_type, refused, nested):
    rope = {"rope_type": rope_type, "factor": 4.0}
    parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": rope} if nested else rope
    with (
        pytest.raises(UserError, match=rf"parallelism.context: .* rope_type is {rope_type}")
        if refused
        else nullcontext()
    ):
        check_sharing(SimpleNamespace(rope_parameters=parameters))


@pytest.fixture
def fake_ranks():
    """Makes this process one of so many ranks that only seem to be there."""
    titan.bind_device("cpu")

    def become(rank, ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=ranks)

    yield become
    dist.destroy_process_group()


def test_a_launcher_that_would_start_a_group_again_in_the_store_of_the_one_before_is_refused(monkeypatch):
    check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match=r"--max-restarts=3: .*nemo_speculative.launch, or set TORCH_DISABLE"):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


def jobs_of_one_process():
    """How many ranks each job of a process has that nobody launched, on a machine that knows of a master."""
    os.environ.pop("WORLD_SIZE", None)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.destroy_process_group()
    found = []
    for _ in range(2):
        with process_group(torch.device("cpu"), ParallelismConfig()):
            found.append(dist.get_world_size())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def test_a_process_that_was_not_launched_is_a_job_of_its_own_whatever_the_environment_says_of_a_master():
    assert on_ranks(1, jobs_of_one_process) == [[1, 1]]


def test_one_of_several_processes_that_nobody_launched_is_told_so(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE=4, but MASTER_ADDR is not set: start with torchrun or .*launch"):
        process_group(torch.device("cpu"), ParallelismConfig(shard=-1)).__enter__()


def seconds_of_groups(path):
    """How long a rank is waited for in each group there is, when a training begins; gloo's own word."""
    titan.bind_device("cpu")
    with waiting_group():
        dims = mesh(ParallelismConfig(context=2))
        kept = context(dims), ShardedTarget(path, aux_layers=[]), TensorParallelTarget(path, aux_layers=[])
        limit_waits(dims, 40)
        groups = [group for group in dist.distributed_c10d._world.pg_map if dist.get_backend(group) == "gloo"]
        found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    del kept
    return found


def test_in_every_group_but_the_patient_one_a_rank_is_waited_for_only_so_long(target_dir):
    for found in on_ranks(2, seconds_of_groups, target_dir):
        found.remove(FIRST_RANK_TIMEOUT.total_seconds())
        # The default group, that of the target beside the draft's context, and those of both targets held together.
        assert len(found) >= 4 and set(found) == {40.0}, found
