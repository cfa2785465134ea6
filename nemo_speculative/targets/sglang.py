"""``backend=sglang``: the target through SGLang's ModelRunner in this process.

For a target that is faster with SGLang's kernels, is quantized, or does not fit one GPU.  The functions from
:func:`load_runner` on depend on SGLang's internals, as they are in ``VERSIONS``; they import SGLang when called.
"""

import logging
import os
import sys
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.parallelism import all_gather_ragged
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.utils.errors import UserError, describe_error
from nemo_speculative.utils.network import free_port
from nemo_speculative.utils.sglang import CPU_ENGINE, CPU_ENVIRONMENT, installed_version, parse_flags

VERSIONS = ("0.5.23",)
"""Tested versions."""


class SGLangTarget(Target):
    """A frozen model that SGLang runs, tensor-parallel over all ranks, which compute the batch of each rank in turn.

    transformers' embedding and head are on every rank as a whole.  Its options are those of SGLangBackendConfig.

    Raises:
        UserError: see :func:`load_runner`; or SGLang's logits are not the head's.
    """

    def __init__(self, path: Path, *, max_tokens: int = 16384, flags: Sequence[str] = (), **options: Any):
        super().__init__(path, **options)
        self.runner = load_runner(self, max_tokens, flags)
        self.max_tokens = min(max_tokens, self.runner.max_total_num_tokens)
        self.collective = _num_ranks() > 1
        self._last_forward: torch.cuda.Event | None = None
        self._check_head()

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """The states at padding are zeros."""
        with self._one_at_a_time():
            return self._compute(batch).shard(batch.shard)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Orders forward passes of different CUDA streams: all use the same KV cache."""
        if self.device.type != "cuda":
            yield
            return
        current = torch.cuda.current_stream(self.device)
        if self._last_forward is not None:
            current.wait_event(self._last_forward)
        yield
        self._last_forward = current.record_event()

    def _compute(self, batch: Batch) -> TargetOutput:
        rows, length = batch.input_ids.shape
        ranges = [range(span.row * length + span.start, span.row * length + span.end) for span in batch.spans]
        # From the host: SGLang schedules there, and reading the device would wait for all of its queued work.
        flat = batch.on_host.input_ids.flatten().tolist()
        own = [flat[r.start : r.stop] for r in ranges]
        width, empty = self.config.hidden_size, torch.zeros(0, dtype=self.dtype, device=self.device)
        aux, hidden = [empty.new_zeros(0, width * len(self.aux_layers))], [empty.new_zeros(0, width)]
        for documents in _documents_of_all_ranks(own):
            for group in _groups(documents, self.max_tokens):
                group_aux, group_hidden, _ = run_documents(self.runner, group, bool(self.aux_layers))
                if documents is own:
                    aux.append(group_aux)
                    hidden.append(group_hidden)
        at = torch.cat([torch.arange(r.start, r.stop) for r in ranges] or [torch.arange(0)]).to(self.device)
        return TargetOutput(*(_to_rows(torch.cat(x), at, rows, length) for x in (aux, hidden)))

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuses a model whose logits SGLang scales or caps in another way."""
        probe = [i % self.config.vocab_size for i in range(8)]
        _, hidden, logits = run_documents(self.runner, [probe], bool(self.aux_layers))
        self.require_own_logits(logits[0], hidden[-1], "sglang; try backend=hf")


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _documents_of_all_ranks(own: list[list[int]]) -> Iterator[list[list[int]]]:
    """The documents of each rank in turn; this rank's are the object ``own``."""
    if _num_ranks() == 1:
        yield own
        return
    # Packed as numbers (count, lengths, ids): torch's object collectives unpickle what they receive.
    packed = torch.tensor([len(own), *map(len, own), *chain.from_iterable(own)])
    for rank, numbers in enumerate(all_gather_ragged(packed)):
        count, *rest = numbers.tolist()
        lengths, ids = rest[:count], iter(rest[count:])
        yield own if rank == dist.get_rank() else [list(islice(ids, length)) for length in lengths]


def _groups(documents: Sequence[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Consecutive documents of at most ``max_tokens`` tokens together; raises UserError if one is longer."""
    group: list[list[int]] = []
    for document in documents:
        if len(document) > max_tokens:
            raise UserError(
                f"backend.max_tokens: a document has {len(document)} tokens, and SGLang's cache has room for "
                f"{max_tokens}; raise backend.max_tokens, or lower data.max_length"
            )
        if sum(map(len, group)) + len(document) > max_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _to_rows(x: torch.Tensor, at: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Scatters x [N, w] to the flat positions ``at`` [N]: → [rows, length, w], zeros elsewhere."""
    return x.new_zeros(rows * length, x.shape[-1]).index_copy_(0, at, x).unflatten(0, (rows, length))


def load_runner(target: Target, max_tokens: int, flags: Sequence[str]) -> Any:
    """SGLang's ModelRunner for ``target``, tensor-parallel over all ranks of this job; one per process.

    Every rank must load it, and run the same documents in the same order.

    Raises:
        UserError: SGLang is missing or of another version, or refuses the target or ``flags``.
    """
    installed = installed_version()
    if installed not in VERSIONS:
        state = f"SGLang {installed} is installed" if installed else f"SGLang is not installed for {sys.executable}"
        raise UserError(
            f"backend=sglang: {state}; this backend uses its internals, and works with {', '.join(VERSIONS)}: install "
            "that as docs/backends.md says, or use backend=hf"
        )
    _make_importable(target.device)
    own = _own_flags(target, max_tokens)
    for flag in (word.split("=")[0] for word in flags):
        if flag.startswith("--") and flag in own:
            raise UserError(f"backend.flags holds {flag}, which the backend sets itself: leave it out")
    trust = ["--trust-remote-code"] if target.trust_remote_code else []  # flags may repeat it
    with _errors_as_one_line():
        return _start(parse_flags([*own, *trust, *flags], "backend.flags"), target.device)


@torch.no_grad()
def run_documents(
    runner: Any, documents: Sequence[Sequence[int]], has_aux: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the model on token ids of ``documents``, N together, separated from each other.

    Returns:
        aux [N, A * h], lowest layer first; last hidden states [N, h]; logits [documents, V] of their last tokens.
    """
    with _errors_as_one_line():
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

        forward_batch = ForwardBatch.init_new(
            _schedule_batch(runner, documents), runner, capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )  # fmt: skip
        output = runner.forward(forward_batch).logits_output
        # Nothing is continued, so the whole cache is free for the next call.
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        if has_aux:
            return output.hidden_states, output.last_hidden_states, output.next_token_logits
        return output.hidden_states[:, :0], output.hidden_states, output.next_token_logits


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """Turns an error of SGLang within the block into a one-line UserError that names the tested versions."""
    try:
        yield
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"backend=sglang: the internals of SGLang {installed_version()} are not as expected "
            f"({describe_error(error)}); this works with {', '.join(VERSIONS)} as published: reinstall it, or use "
            "backend=hf"
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"backend=sglang: SGLang {installed_version()} refuses: {describe_error(error)}") from error


def _make_importable(device: torch.device) -> None:
    """Sets what SGLang reads from the environment when it is imported."""
    if device.type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = CPU_ENVIRONMENT["SGLANG_USE_CPU_ENGINE"]
        # One core per rank: SGLang's own choice fails with more ranks than NUMA nodes.
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(_num_ranks()))
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
        sys.path[:] = [str(CPU_ENGINE), *(p for p in sys.path if p != str(CPU_ENGINE))]


def _own_flags(target: Target, max_tokens: int) -> list[str]:
    flags = [
        "--model-path", str(target.path), "--dtype", str(target.dtype).removeprefix("torch."),
        "--device", target.device.type, "--tp-size", str(_num_ranks()), "--max-total-tokens", str(max_tokens),
        "--log-level", "error", "--disable-radix-cache", "--disable-cuda-graph", "--skip-tokenizer-init",
        "--grammar-backend", "none",
    ]  # fmt: skip
    if target.aux_layers:
        # The algorithm selects the convention that layer id v is the output of layer v; no draft is loaded.
        flags += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        flags += ["--return-aux-hidden-state-layer-ids", *map(str, target.aux_layers)]
    if target.device.type == "cpu":
        flags += ["--attention-backend", "torch_native", "--mem-fraction-static", "0.3"]
    return flags


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
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.runtime_context import get_schedule
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    requests = []
    for number, document in enumerate(documents):
        sampling, ids = SamplingParams(temperature=0, max_new_tokens=1), array("q", document)
        request = Req(rid=number, origin_input_text="", origin_input_ids=ids, sampling_params=sampling)
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len, request.extend_end = -1, len(document)
        requests.append(request)
    allocator = runner.token_to_kv_pool_allocator
    cache = TreeCacheNamespace(
        page_size=get_schedule().page_size, device=runner.device, token_to_kv_pool_allocator=allocator
    )
    batch = ScheduleBatch.init_new(
        reqs=requests, req_to_token_pool=runner.req_to_token_pool, token_to_kv_pool_allocator=allocator,
        tree_cache=cache, model_config=runner.model_config, enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )  # fmt: skip
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
        batch.prefill_input_ids_cpu = None
    return batch
