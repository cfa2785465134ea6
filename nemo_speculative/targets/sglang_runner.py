"""SGLang's ModelRunner in this process, made to say what it computes of texts.

The only module that knows SGLang from inside; it is imported where ``backend=sglang`` is built, and nowhere else.  What
it takes for granted holds for the versions in ``VERSIONS``.
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
"""Those that it was run with."""
T = TypeVar("T")


@dataclass(frozen=True)
class Extended:
    """Of the tokens of some texts, one after the other."""

    aux_hidden_states: torch.Tensor
    """[N, A * h]: outputs of the aux layers, in their order."""
    last_hidden_state: torch.Tensor
    """[N, h]: after the final norm."""
    last_logits: torch.Tensor
    """[texts, V]: of each text's last token."""


class Runner:
    """A target that SGLang runs, tensor-parallel over all ranks of this job; one for each process.

    Every rank must make it, and give it the same texts at the same time.

    Args:
        max_tokens: in one forward.
        flags: further ones of SGLang's server.

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
        _check_flags(own, flags)
        self.has_aux = bool(aux_layers)
        self._runner = _as_one_line(self._version, lambda: _start(parse_flags([*own, *flags], "backend.flags"), device))
        self.max_tokens = min(max_tokens, self._runner.max_total_num_tokens)

    def extend(self, texts: Sequence[Sequence[int]]) -> Extended:
        """What it computes of ``texts``, token ids, none of which sees another; at most ``max_tokens`` together.

        Raises:
            UserError: a changed internal of SGLang.
        """
        return _as_one_line(self._version, lambda: self._forward(texts))

    @torch.no_grad()
    def _forward(self, texts: Sequence[Sequence[int]]) -> Extended:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

        batch = _scheduled(self._runner, texts)
        forward_batch = ForwardBatch.init_new(
            batch, self._runner, capture_hidden_mode=CaptureHiddenMode.FULL, return_hidden_states_before_norm=False
        )
        found = self._runner.forward(forward_batch).logits_output
        # Nothing is continued: the next texts find the whole cache free.
        self._runner.req_to_token_pool.clear()
        self._runner.token_to_kv_pool_allocator.clear()
        if not self.has_aux:
            return Extended(found.hidden_states[:, :0], found.hidden_states, found.next_token_logits)
        return Extended(found.hidden_states, found.last_hidden_states, found.next_token_logits)


def _check_version() -> str:
    found = installed_version()
    if found is None:
        raise UserError(
            f"backend=sglang: SGLang is not installed beside {sys.executable}; install it as docs/backends.md says, or "
            "take backend=hf"
        )
    if found not in VERSIONS:
        raise UserError(
            f"backend=sglang: SGLang {found} is installed; it is used from inside, which works with "
            f"{', '.join(VERSIONS)}: install that, or take backend=hf"
        )
    return found


def _as_one_line(found: str, call: Callable[[], T]) -> T:
    """``call()``, where what SGLang raises is a line that says with what it works."""
    try:
        return call()
    except UserError:
        raise
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"backend=sglang: SGLang {found} is not as expected from inside ({type(error).__name__}: {error}); it "
            f"works with {', '.join(VERSIONS)} as published: reinstall it, or take backend=hf"
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"backend=sglang: SGLang {found} refuses: {first}") from error


def _make_importable(device: torch.device) -> None:
    """What SGLang looks for when it is imported."""
    if device.type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = CPU_ENVIRONMENT["SGLANG_USE_CPU_ENGINE"]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _core_of_each_rank())
        sys.path[:] = [str(CPU_ENGINE), *(p for p in sys.path if p != str(CPU_ENGINE))]


def _core_of_each_rank() -> str:
    """SGLang wants to be told where there are more ranks than NUMA nodes."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(_world_size()))


def _own_flags(
    path: Path, aux_layers: Sequence[int], dtype: torch.dtype, device: torch.device, max_tokens: int
) -> list[str]:
    flags = [
        "--model-path", str(path), "--dtype", str(dtype).removeprefix("torch."), "--device", device.type,
        "--tp-size", str(_world_size()), "--max-total-tokens", str(max_tokens), "--log-level", "error",
        "--disable-radix-cache", "--disable-cuda-graph", "--skip-tokenizer-init", "--grammar-backend", "none",
    ]  # fmt: skip
    if aux_layers:
        # The algorithm names the convention, by which v is the output of layer v; no draft is loaded.
        flags += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        flags += ["--return-aux-hidden-state-layer-ids", *map(str, aux_layers)]
    if device.type == "cpu":
        flags += ["--attention-backend", "torch_native", "--mem-fraction-static", "0.3"]
    return flags


def _check_flags(own: Sequence[str], given: Sequence[str]) -> None:
    for flag in (word.split("=")[0] for word in given):
        if flag.startswith("--") and flag in own:
            raise UserError(f"backend.flags holds {flag}, which the backend sets itself: leave it out")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _start(server_args: Any, device: torch.device) -> Any:
    """A loaded ModelRunner with memory for its cache.  As SGLang's own benchmark of a single batch does it."""
    # Every model that lacks a package says so.
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


def _scheduled(runner: Any, texts: Sequence[Sequence[int]]) -> Any:
    """One batch of whole texts, for which the cache holds nothing."""
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
        reqs=[_request(number, text) for number, text in enumerate(texts)],
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


def _request(number: int, text: Sequence[int]) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    request = Req(
        rid=number,
        origin_input_text="",
        origin_input_ids=array("q", text),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len, request.extend_end = -1, len(text)
    return request
