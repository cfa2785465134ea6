"""The layout of a draft over ranks changes no loss or gradient, and communication is minimal."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import (
    FIRST_RANK_TIMEOUT,
    check_restarts,
    context_group,
    data_rank,
    first_rank_waiting_group,
    limit_collective_waits,
    mesh,
    process_group,
    set_gradient_sync,
    shard_draft,
    start_unshard,
)
from nemo_speculative.targets.sharded import FSDP2Target, TensorParallelTarget
from nemo_speculative.training.checks import check_context_parallel_rope
from nemo_speculative.training.trainer import TTTModule
from nemo_speculative.utils.errors import UserError
from tests.algorithms.cases import eagle, eagle3, lay_out, make_documents
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
"""Lengths of the documents of eight rows of 32 tokens, in pairs of rows."""


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives by name."""

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
    """Loss and full gradient of the global batch, and the collectives it took."""
    dims = mesh(ParallelismConfig(**config))
    alone, goal = case.make_objective(), case.make_objective(context=context_group(dims))
    module = shard_draft(TTTModule(case.make_draft(), goal), dims, dtype, config.get("offload", False))
    rank, ranks = data_rank(dims)
    torch.manual_seed(0)
    batches = [lay_out(layout, 32) for layout in rows()]
    counts = sum(alone.schedule(batch).counts for batch, _ in batches)
    micro_batches = [(goal.schedule(batch), supervision) for batch, supervision in batches[rank::ranks]]
    loss = torch.zeros(())
    with CollectiveCounter() as collectives:
        start_unshard(module)
        for n, (schedule, supervision) in enumerate(micro_batches):
            set_gradient_sync(module, last=n + 1 == len(micro_batches))
            out = module(schedule, supervision.shard(schedule.batch.shard), counts)
            out.loss.backward()
            loss += out.loss.detach()
    norm = titan.clip_grad_norm_(module.parameters(), 1e9)
    dist.all_reduce(loss)
    gradients = {n.removeprefix("draft."): whole(p.grad).clone() for n, p in module.named_parameters()}
    shards = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in module.parameters())
    return {
        "loss": loss,
        "norm": whole(norm),
        "gradients": gradients,
        "shards": shards,
        "collectives": collectives.counts,
    }


def whole(x):
    return getattr(x, "full_tensor", lambda: x)().detach()


def all_layouts():
    layouts = LAYOUTS[dist.get_world_size()]
    titan.bind_device("cpu")
    results = {f"{case}, {name}": one_step(CASES[case], config) for case in CASES for name, config in layouts.items()}
    whole_rows = [name for name in layouts if "context" not in layouts[name]]
    return results | {
        f"bfloat16, {name}": one_step(CASES["eagle3"], layouts[name], torch.bfloat16) for name in whole_rows
    }


@pytest.fixture(scope="module")
def results():
    """Results of rank 0, by the number of ranks."""
    return {ranks: on_ranks(ranks, all_layouts)[0] for ranks in LAYOUTS}


WHICH = [
    (ranks, case, name)
    for ranks, layouts in LAYOUTS.items()
    for case in (*CASES, "bfloat16")
    for name, config in layouts.items()
    # In bfloat16 part of a row rounds to another gradient than the whole.
    if case != "bfloat16" or "context" not in config
]


@pytest.mark.parametrize("ranks, case, layout", WHICH)
def test_loss_and_gradients_are_those_of_one_rank(results, ranks, case, layout):
    one, many = results[1][f"{case}, single"], results[ranks][f"{case}, {layout}"]
    torch.testing.assert_close(many["loss"], one["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(many["norm"], one["norm"], rtol=1e-6, atol=0)
    for name, expected in one["gradients"].items():
        error = (many["gradients"][name] - expected).abs().max()
        assert error <= 1e-6 * max(expected.abs().max(), one["norm"] * 1e-2), name


def test_bfloat16_is_the_compute_dtype(results):
    assert results[1]["bfloat16, single"]["loss"] != results[1]["eagle3, single"]["loss"]


@pytest.mark.parametrize("ranks, layout, share", [(2, "fsdp2", 2), (2, "ddp", 1), (4, "fsdp2", 4), (4, "hsdp", 2)])
def test_a_rank_holds_its_shard_of_the_draft(results, ranks, layout, share):
    whole_draft = results[1]["eagle3, single"]["shards"]
    assert results[ranks][f"eagle3, {layout}"]["shards"] == pytest.approx(whole_draft / share, rel=0.05)


@pytest.mark.parametrize("ranks, layout, replicas", [(2, "fsdp2", 0), (4, "fsdp2", 0), (4, "hsdp", 1), (4, "ddp", 1)])
def test_a_step_of_several_micro_batches_gathers_and_reduces_once(results, ranks, layout, replicas):
    counts, sharded = results[ranks][f"eagle3, {layout}"]["collectives"], int(layout != "ddp")
    gathered = sum(count for name, count in counts.items() if "allgather" in name or "all_gather" in name)
    scattered = sum(count for name, count in counts.items() if "reduce_scatter" in name)
    reduced = sum(count for name, count in counts.items() if "allreduce" in name or "all_reduce" in name)
    assert (gathered, scattered, reduced) == (sharded, sharded, replicas), counts


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
def test_a_size_of_minus_one_is_inferred(config, ranks, sizes):
    assert ParallelismConfig(**config).sizes(ranks) == sizes


@pytest.mark.parametrize(
    "config, ranks", [({}, 2), ({"shard": 3}, 4), ({"replicate": -1, "shard": 8}, 4), ({"context": 2, "shard": -1}, 3)]
)
def test_sizes_that_do_not_multiply_to_the_ranks_are_rejected(config, ranks):
    with pytest.raises(UserError, match=rf"parallelism: replicate=.*do not multiply to the {ranks} process"):
        ParallelismConfig(**config).sizes(ranks)


def test_only_one_size_can_be_inferred():
    with pytest.raises(UserError, match=r"parallelism.replicate and parallelism.shard are both -1"):
        ParallelismConfig(replicate=-1, shard=-1)


@pytest.mark.parametrize("ranks, config", [(64, {"replicate": -1, "shard": 8}), (512, {"shard": -1, "context": 8})])
def test_ranks_that_share_rows_are_neighbors(ranks, config, fake_ranks):
    """torch's fake backend: a mesh of any size in one process."""
    ranks_seen = []
    for rank in (0, 1, 7, 8, ranks - 1):
        fake_ranks(rank, ranks)
        dims = mesh(ParallelismConfig(**config))
        ranks_seen.append(data_rank(dims))
        names = ["dp_replicate", "fsdp"] if dims.dp_replicate > 1 else ["fsdp"]
        assert [dims.get_mesh(name).size() for name in names] == ([8, 8] if ranks == 64 else [512])
    context = config.get("context", 1)
    assert ranks_seen == [(rank // context, ranks // context) for rank in (0, 1, 7, 8, ranks - 1)]


@pytest.mark.parametrize("rope_type, refused", [("yarn", False), ("dynamic", True), ("longrope", True)])
@pytest.mark.parametrize("nested", [False, True])
def test_frequencies_that_depend_on_the_longest_position_are_rejected_under_context_parallelism(
    rope_type, refused, nested
):
    rope = {"rope_type": rope_type, "factor": 4.0}
    parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": rope} if nested else rope
    with (
        pytest.raises(UserError, match=rf"parallelism.context: .* rope_type is {rope_type}")
        if refused
        else nullcontext()
    ):
        check_context_parallel_rope(SimpleNamespace(rope_parameters=parameters))


@pytest.fixture
def fake_ranks():
    """Makes this process one rank of torch's fake backend."""
    titan.bind_device("cpu")

    def become(rank, ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=ranks)

    yield become
    dist.destroy_process_group()


def test_a_launcher_that_restarts_ranks_with_the_same_store_is_rejected(monkeypatch):
    check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match=r"--max-restarts=3: .*nemo_speculative.launch, or set TORCH_DISABLE"):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


def world_sizes_without_launcher():
    """World sizes of two jobs of a process without a launcher, where MASTER_ADDR is set."""
    os.environ.pop("WORLD_SIZE", None)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.destroy_process_group()
    sizes = []
    for _ in range(2):
        with process_group(torch.device("cpu"), ParallelismConfig()):
            sizes.append(dist.get_world_size())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return sizes


def test_a_process_without_launcher_is_a_job_of_one_rank_even_if_master_addr_is_set():
    assert on_ranks(1, world_sizes_without_launcher) == [[1, 1]]


def test_several_processes_without_master_addr_are_rejected(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE=4, but MASTER_ADDR is not set: start with torchrun or .*launch"):
        process_group(torch.device("cpu"), ParallelismConfig(shard=-1)).__enter__()


def group_timeouts(path):
    """Timeout of every gloo group once a training starts, in seconds."""
    titan.bind_device("cpu")
    with first_rank_waiting_group():
        dims = mesh(ParallelismConfig(context=2))
        keep_alive = context_group(dims), FSDP2Target(path, aux_layers=[]), TensorParallelTarget(path, aux_layers=[])
        limit_collective_waits(dims, 40)
        groups = [group for group in dist.distributed_c10d._world.pg_map if dist.get_backend(group) == "gloo"]
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    del keep_alive
    return timeouts


def test_a_training_sets_the_timeout_of_every_group_but_rank_0s_own(target_dir):
    for timeouts in on_ranks(2, group_timeouts, target_dir):
        timeouts.remove(FIRST_RANK_TIMEOUT.total_seconds())
        # The default group, the prefetch group of context parallelism, and the groups of both distributed targets.
        assert len(timeouts) >= 4 and set(timeouts) == {40.0}, timeouts
