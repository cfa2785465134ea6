"""Runs a function on several gloo ranks of this machine: processes that share one import of torch."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on every rank; what each rank returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        work = [(rank, world_size, folder, function, args) for rank in range(world_size)]
        processes = [context.Process(target=_run, args=w) for w in work]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * world_size
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    result = function(*args)
    torch.save(result, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
