"""Process group, device mesh, FSDP2 sharding of the draft, and work that rank 0 does for all."""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.functional import pad

from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.utils.errors import PeerLostError, UserError
from nemo_speculative.utils.network import FRESH_STORE, LOOPBACK, bind_collectives_to

T = TypeVar("T")
LARGEST_MATMUL_ERROR = 2e-6
"""Relative to the largest entry; float32 itself has about 4e-7."""
FIRST_RANK_TIMEOUT = timedelta(hours=2)
"""Wait limit while rank 0 makes a target or its answers, measures a draft, or writes."""

_first_rank_group: dist.ProcessGroup | None = None
"""Group in which ranks wait for rank 0; None: the default group, whose timeout is shorter while a draft trains."""

_registered_groups: list[dist.ProcessGroup] = []
"""Groups, in addition to the default one and the mesh's, whose timeout a training sets."""


@contextlib.contextmanager
def process_group(device: torch.device, config: ParallelismConfig) -> Iterator[titan.ParallelDims]:
    """Joins the process group and yields torchtitan's mesh; a process without a launcher is a job of one rank.

    It listens on the loopback only if all processes are on this machine.

    Raises:
        UserError: the sizes of ``config`` do not multiply to the number of processes, a restart would hang, or the
            address of the other processes is not set.
    """
    check_restarts()
    titan.bind_device(device.type)
    ranks, on_cuda = _world_size(), device.type == "cuda"
    config.sizes(ranks)  # before any rank waits for the others
    if on_cuda:
        torch.cuda.set_device(device)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        bind_collectives_to(LOOPBACK)
    if ranks > 1:
        comm = titan.CommConfig(init_timeout_seconds=int(FIRST_RANK_TIMEOUT.total_seconds()), trace_buf_size=0)
        titan.init_distributed(comm, enable_cpu_backend=on_cuda)
    else:  # a store in memory needs no port
        backend = "cuda:nccl,cpu:gloo" if on_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with first_rank_waiting_group():
            yield mesh(config)
    finally:
        dist.destroy_process_group()


def check_restarts() -> None:
    """Raises UserError for a launcher that may restart ranks and keeps its store.

    torch's agent does (pytorch issue 135712): gloo then finds the addresses of ranks that are gone, and waits for them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and FRESH_STORE not in os.environ:
        raise UserError(
            f"torchrun --max-restarts={restarts}: ranks that are started again would wait for those that are gone; "
            "start with python -m nemo_speculative.launch, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )


def _world_size() -> int:
    """World size; sets the variables of a job of one rank where no launcher did.  Raises UserError without address."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    ranks = num_ranks()
    if ranks > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE={ranks}, but MASTER_ADDR is not set: start with torchrun or python -m nemo_speculative.launch"
            ", or unset WORLD_SIZE"
        )
    return ranks


def mesh(config: ParallelismConfig) -> titan.ParallelDims:
    """torchtitan's mesh over the ranks of the process group."""
    ranks = dist.get_world_size()
    replicate, shard = config.sizes(ranks)
    dims = titan.ParallelDims(
        dp_replicate=replicate, dp_shard=shard, cp=config.context, tp=1, pp=1, ep=1, world_size=ranks,
        spmd_backend="partial_dtensor",
    )  # fmt: skip
    dims.build_mesh()
    return dims


def limit_collective_waits(dims: titan.ParallelDims, seconds: float) -> None:
    """Sets the timeout of all collectives, for the training; in the set-up rank 0 may work for hours."""
    dist.all_reduce(torch.zeros(1))  # all ranks have finished the set-up
    axes = dims.get_all_one_dimensional_meshes().values()
    for group in (None, *(axis.get_group() for axis in axes), *_registered_groups):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextlib.contextmanager
def fast_float32_matmuls(device: torch.device) -> Iterator[None]:
    """On a CPU, uses oneDNN for float32 matrix products where it is as exact as torch's own kernels.

    "medium" permits bfloat16 internally, which some CPUs do use: the error is measured, and the setting restored there.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        exact = a.double() @ b.double()
        if float(((a @ b).double() - exact).abs().max() / exact.abs().max()) > LARGEST_MATMUL_ERROR:
            torch.set_float32_matmul_precision(before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def data_rank(dims: titan.ParallelDims) -> tuple[int, int]:
    """Data-parallel rank and size; ranks that share rows are neighbors: context is the mesh's innermost axis."""
    return dist.get_rank() // dims.cp, dims.world_size // dims.cp


def context_group(dims: titan.ParallelDims) -> ContextGroup:
    """The ranks that share the tokens of this rank's rows."""
    if dims.cp == 1:
        return NO_CONTEXT_PARALLELISM
    group = dims.get_mesh("cp").get_group()
    prefetch_group = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    return ContextGroup(group, register_group(prefetch_group))


def shard_draft(
    module: nn.Module, dims: titan.ParallelDims, compute_dtype: torch.dtype, offload: bool = False
) -> nn.Module:
    """Applies FSDP2 to ``module`` as one unit: float32 shards and reductions, computation in ``compute_dtype``.

    One unit is gathered once per optimizer step: as a unit of its own a layer would be gathered at each of the T steps
    of the unroll.  Replicas are the second mesh axis; with one rank per shard that is DDP, in the same layout on disk.
    A single process that computes in float32 needs no FSDP.

    Args:
        offload: keep the shards, and the optimizer's state of them, in the host's memory.
    """
    if dims.world_size == 1 and compute_dtype == torch.float32 and not offload:
        return module
    axes = dims.get_mesh(["dp_replicate", "fsdp"] if dims.dp_replicate > 1 else "fsdp")
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloading = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    fully_shard(module, mesh=axes, mp_policy=precision, offload_policy=offloading, reshard_after_forward=False)
    titan.disable_fsdp_gradient_division(module)
    assert isinstance(module, FSDPModule)
    # gloo has no PREMUL_SUM, which a divide factor of 1 would choose.
    module.set_force_sum_reduction_for_comms(True)
    return module


def set_gradient_sync(module: nn.Module, last: bool) -> None:
    """Before a micro-batch: only the backward pass of the last one reduces gradients and frees gathered weights."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)


def start_unshard(module: nn.Module) -> None:
    """Starts to gather the weights while the target computes."""
    if isinstance(module, FSDPModule):
        module.unshard(async_op=True)


def num_ranks() -> int:
    """Number of processes that the launcher started, from WORLD_SIZE: valid before the process group exists."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or not int(value):
        raise UserError(f"WORLD_SIZE={value}: expected the number of processes; set it to that, or unset it")
    return int(value)


def is_first_rank() -> bool:
    """Whether this process is rank 0; valid before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def first_rank_waiting_group() -> Iterator[None]:
    """Gives :func:`on_first_rank` a process group of its own, with :data:`FIRST_RANK_TIMEOUT`."""
    global _first_rank_group
    _first_rank_group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    try:
        yield
    finally:
        _first_rank_group = None
        _registered_groups.clear()


def register_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Registers ``group`` among those whose timeout a training sets, until the process group ends; returns it."""
    _registered_groups.append(group)
    return group


def on_first_rank(function: Callable[[], T]) -> T | None:
    """Calls ``function`` on rank 0 while the others wait, where the result is None.  An error on rank 0 ends all."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except BaseException as error:
            failure = error
            ignore_sigterm()
    failed = torch.tensor([failure is not None])
    dist.broadcast(failed, src=0, group=_first_rank_group)
    if failure is not None:
        raise failure
    if failed.item():
        raise PeerLostError("rank 0 failed; its message says why")
    return result


def first_rank_first(function: Callable[[], T]) -> T:
    """Calls ``function`` on rank 0, then on the others, which read from disk what rank 0 wrote there."""
    result = on_first_rank(function)
    return function() if dist.get_rank() else result  # type: ignore[return-value]


def ignore_sigterm() -> None:
    """Lets a failing rank print its error: the launcher sends SIGTERM to all ranks as soon as any one has ended."""
    if dist.get_world_size() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def all_gather_ragged(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """The int64 ``tensor`` of every rank of ``group``, on the host; sizes may differ, the number of dimensions not."""
    shapes_by_rank = [torch.empty(tensor.ndim, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes_by_rank, torch.tensor(tensor.shape), group=group)
    shapes = [shape.tolist() for shape in shapes_by_rank]
    longest = max(math.prod(shape) for shape in shapes)
    received = [torch.empty(longest, dtype=torch.int64) for _ in shapes]
    dist.all_gather(received, pad(tensor.cpu().flatten(), (0, longest - tensor.numel())), group=group)
    return [x[: math.prod(shape)].view(shape) for x, shape in zip(received, shapes, strict=True)]
