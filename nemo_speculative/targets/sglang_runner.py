"""SGLang's ModelRunner in this process, used for the hidden states of whole documents.

The only module that depends on SGLang's internals, as they are in ``VERSIONS``; imported only for ``backend=sglang``.
"""

import logging
import os
import sys
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.network import free_port
from nemo_speculative.utils.sglang import CPU_ENGINE, CPU_ENVIRONMENT, installed_version, parse_flags

VERSIONS = ("0.5.23",)
"""Tested versions."""
T = TypeVar("T")


@dataclass(frozen=True)
class ForwardOutput:
    """Output for the N tokens of some documents, end to end."""

    aux_hidden_states: torch.Tensor
    """[N, A * h]: outputs of the aux layers, lowest layer first."""
    last_hidden_state: torch.Tensor
    """[N, h]: output of the final norm."""
    last_logits: torch.Tensor
    """[documents, V]: logits of each document's last token."""


class Runner:
    """A model that SGLang runs, tensor-parallel over all ranks of this job; one per process.

    Every rank must construct it, and call it with the same documents in the same order.

    Args:
        max_tokens: number of tokens in one forward pass.
        flags: further flags of SGLang's server.

    Raises:
        UserError: SGLang is missing or of another version, or refuses the target or ``flags``.
    """

    def __init__(
        self, path: Path, *, aux_layers: Sequence[int], dtype: torch.dtype, device: torch.device, max_tokens: int,
        flags: Sequence[str] = (),
    ):  # fmt: skip
        self._version = _check_version()
        _make_importable(device)
        own = _own_flags(path, aux_layers, dtype, device, max_tokens)
        for flag in (word.split("=")[0] for word in flags):
            if flag.startswith("--") and flag in own:
                raise UserError(f"backend.flags holds {flag}, which the backend sets itself: leave it out")
        self.has_aux = bool(aux_layers)
        self._runner = _as_one_line(self._version, lambda: _start(parse_flags([*own, *flags], "backend.flags"), device))
        self.max_tokens = min(max_tokens, self._runner.max_total_num_tokens)

    def forward(self, documents: Sequence[Sequence[int]]) -> ForwardOutput:
        """Runs the model on token ids of ``documents``, separated from each other; at most ``max_tokens`` together.

        Raises:
            UserError: SGLang's internals are not as expected.
        """
        return _as_one_line(self._version, lambda: self._forward(documents))

    @torch.no_grad()
    def _forward(self, documents: Sequence[Sequence[int]]) -> ForwardOutput:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

        batch = _schedule_batch(self._runner, documents)
        forward_batch = ForwardBatch.init_new(
            batch, self._runner, capture_hidden_mode=CaptureHiddenMode.FULL, return_hidden_states_before_norm=False
        )
        output = self._runner.forward(forward_batch).logits_output
        # Nothing is continued, so the whole cache is free for the next call.
        self._runner.req_to_token_pool.clear()
        self._runner.token_to_kv_pool_allocator.clear()
        if not self.has_aux:
            return ForwardOutput(output.hidden_states[:, :0], output.hidden_states, output.next_token_logits)
        return ForwardOutput(output.hidden_states, output.last_hidden_states, output.next_token_logits)


def _check_version() -> str:
    installed = installed_version()
    if installed is None:
        raise UserError(
            f"backend=sglang: SGLang is not installed for {sys.executable}; install it as docs/backends.md says, or "
            "use backend=hf"
        )
    if installed not in VERSIONS:
        raise UserError(
            f"backend=sglang: SGLang {installed} is installed; this backend uses its internals, and works with "
            f"{', '.join(VERSIONS)}: install that, or use backend=hf"
        )
    return installed


def _as_one_line(version: str, call: Callable[[], T]) -> T:
    """Returns ``call()``; an error of SGLang becomes a one-line UserError that names the tested versions."""
    try:
        return call()
    except UserError:
        raise
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"backend=sglang: the internals of SGLang {version} are not as expected ({type(error).__name__}: {error}); "
            f"this works with {', '.join(VERSIONS)} as published: reinstall it, or use backend=hf"
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"backend=sglang: SGLang {version} refuses: {first}") from error


def _make_importable(device: torch.device) -> None:
    """Sets what SGLang reads from the environment when it is imported."""
    if device.type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = CPU_ENVIRONMENT["SGLANG_USE_CPU_ENGINE"]
        # One core per rank: SGLang's own choice fails with more ranks than NUMA nodes.
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(_world_size()))
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
        sys.path[:] = [str(CPU_ENGINE), *(p for p in sys.path if p != str(CPU_ENGINE))]


def _own_flags(
    path: Path, aux_layers: Sequence[int], dtype: torch.dtype, device: torch.device, max_tokens: int
) -> list[str]:
    flags = [
        "--model-path", str(path), "--dtype", str(dtype).removeprefix("torch."), "--device", device.type,
        "--tp-size", str(_world_size()), "--max-total-tokens", str(max_tokens), "--log-level", "error",
        "--disable-radix-cache", "--disable-cuda-graph", "--skip-tokenizer-init", "--grammar-backend", "none",
    ]  # fmt: skip
    if aux_layers:
        # The algorithm selects the convention that layer id v is the output of layer v; no draft is loaded.
        flags += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        flags += ["--return-aux-hidden-state-layer-ids", *map(str, aux_layers)]
    if device.type == "cpu":
        flags += ["--attention-backend", "torch_native", "--mem-fraction-static", "0.3"]
    return flags


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _start(server_args: Any, device: torch.device) -> Any:
    """A loaded ModelRunner with its KV cache, made as SGLang's one_batch benchmark makes it."""
    # Silences one line for each model class whose packages are missing.
    logging.getLogger("sglang").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        from sglang.benchmark.one_batch import _init_process_global_configs
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

    server_args.resolve_once()
    rank = dist.get_rank() if dist.is_initialized() else 0
    gpu_id, port = device.index or 0, free_port()
    ranks = SpawnRanks(world_rank=spawn_world_rank(server_args, tp_rank=rank, pp_rank=0), gpu_id=gpu_id)
    publish(server_args, role="scheduler", ranks=ranks)
    _init_process_global_configs()
    bootstrap.init_parallel_runtime(server_args=server_args, device=device.type, dist_port=port)
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = ModelRunner(
        model_config=model_config, mem_fraction_static=server_args.mem_fraction_static, gpu_id=gpu_id, nccl_port=port,
        server_args=server_args,
    )  # fmt: skip
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def _schedule_batch(runner: Any, documents: Sequence[Sequence[int]]) -> Any:
    """A batch of whole documents, none of which is in the cache."""
    from sglang.benchmark.one_batch import TreeCacheNamespace
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.runtime_context import get_schedule
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    cache = TreeCacheNamespace(
        page_size=get_schedule().page_size,
        device=runner.device,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
    )
    batch = ScheduleBatch.init_new(
        reqs=[_request(number, document) for number, document in enumerate(documents)],
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
        batch.prefill_input_ids_cpu = None
    return batch


def _request(number: int, input_ids: Sequence[int]) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    request = Req(
        rid=number,
        origin_input_text="",
        origin_input_ids=array("q", input_ids),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len, request.extend_end = -1, len(input_ids)
    return request
