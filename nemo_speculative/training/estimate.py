"""Time and memory of a training step, estimated without loading weights (``plan=true``).

The step's own code runs on the meta device (shapes and dtypes, no data), where a recorder counts FLOPs and the bytes of
tensors alive.  Seconds are those of pieces of the step that run for real on constant weights, scaled by their FLOPs.
"""

import contextlib
import copy
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from hydra.utils import get_class
from torch.nn.functional import embedding, linear, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import bmm_flop, flop_registry, mm_flop, sdpa_flop
from transformers import AutoModel, AutoModelForCausalLM, masking_utils

from nemo_speculative.algorithms.common import losses, schedule
from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.config.schema import READ_AHEAD, MuonConfig, TrainJob
from nemo_speculative.data.batch import Batch, collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed import context_parallel, titan
from nemo_speculative.distributed.parallelism import fast_float32_matmuls
from nemo_speculative.targets import document_attention
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.training.optimizer import NOT_HIDDEN, build_optimizers

META = torch.device("meta")
FLOAT32 = 4
PIECE_FLOPS = {"cpu": 3e10, "cuda": 3e13}
"""Size of the pieces that are measured: tenths of a second."""
PIECE_RUNS, PIECE_SECONDS, SHORTEST_PIECE = 3, 2.0, 256
"""Runs of a piece, seconds after which none starts, and tokens of the smallest piece."""
CPU_HEAP_SHARE, CPU_HEAP_BYTES = 0.25, 60e6
"""Memory that a CPU's allocator leaves unused between blocks, as a share of temporary tensors, and that libraries take
at first use: roughly calibrated by ``python -m benchmarks.plan --cases tiny,S-50,M-50``, not counted."""


def _attention_flops(query: Any, key: Any, value: Any, dropout_p: float = 0, is_causal: bool = False, **_: Any) -> int:
    """A causal call computes about half of the scores."""
    return sdpa_flop(query.shape, key.shape, value.shape) // (2 if is_causal else 1)


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's table lacks products in place, which add up the head's gradient, and the CPU's attention.
    torch.ops.aten.addmm_: lambda _, a, b, **__: mm_flop(a.shape, b.shape),
    torch.ops.aten.baddbmm_: lambda _, a, b, **__: bmm_flop(a.shape, b.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


class Recorder(TorchDispatchMode):
    """Counts what runs within it: FLOPs of ``part``, those of batched products apart, and the peak of bytes alive."""

    def __init__(self, part: str):
        super().__init__()
        self.part, self.flops, self.live, self.peak = part, Counter[str](), 0, 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output, packet, returns = function(*args, **kwargs), function._overloadpacket, function._schema.returns
        if returns and returns[0].alias_info is None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    self._track(tensor.untyped_storage())
        if packet in FLOPS:
            part = f"{self.part} attention" if "bmm" in str(packet) or "attention" in str(packet) else self.part
            self.flops[part] += FLOPS[packet](*args, **kwargs, out_val=output)
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class Models(NamedTuple):
    """Parameters of a job's target and draft."""

    target: int
    embedding_and_head: int
    table: int
    """Parameters of the target's embedding, or of its head."""
    num_layers: int
    draft: dict[str, torch.Size]
    """The draft's shapes by name."""

    @property
    def draft_parameters(self) -> int:
        return sum(shape.numel() for shape in self.draft.values())


def size_models(job: TrainJob, config: Any, shape: DraftShape) -> Models:
    """Parameters of the target that ``config`` (transformers) describes, and of the draft."""
    with META:
        target = AutoModelForCausalLM.from_config(config)
        draft = get_class(job.draft._target_)(shape)
    tables = {id(m.weight): m.weight.numel() for m in (target.get_input_embeddings(), target.get_output_embeddings())}
    return Models(
        target=sum(p.numel() for p in target.parameters()),
        embedding_and_head=sum(tables.values()),
        table=config.vocab_size * config.hidden_size,
        num_layers=config.num_hidden_layers,
        draft={name: p.shape for name, p in draft.named_parameters()},
    )


class StepModels:
    """Target, draft and objective of a step with arbitrary weights; the target has ``layers`` layers.

    Args:
        runs_as: the type of the device whose chunk sizes the objective takes.
        width: a tensor-parallel rank's share of every layer.
        context: number of context-parallel ranks.
    """

    def __init__(
        self, job: TrainJob, config: Any, shape: DraftShape, device: torch.device, runs_as: str, layers: int,
        width: float = 1.0, context: int = 1,
    ):  # fmt: skip
        self.aux_layers, dtype = job.draft.chosen_aux_layers(config.num_hidden_layers), _dtype(job.model)
        self.head = torch.full((config.vocab_size, config.hidden_size), 0.01, dtype=dtype, device=device)
        self.decoder = _decoder(config, dtype, layers, width).to_empty(device=device)
        for tensor in (*self.decoder.parameters(), *self.decoder.buffers()):
            tensor.data.fill_(0.01)
        self._captured: list[torch.Tensor] = []
        for layer in self.aux_layers:
            if layer < layers:
                self.decoder.layers[layer].register_forward_hook(self._capture)
        with device:
            self.draft = get_class(job.draft._target_)(shape).attach(self)
        objective: Any = get_class(job.draft.objective)
        self.objective = objective(
            self, job.draft, seed=job.seed, tau_steps=1, context=context_parallel.ContextGroup.planned(context),
            chunk_slots=job.trainer.slots(shape.hidden_size, runs_as),
        )  # fmt: skip

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embedding(input_ids, self.head)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        return linear(last_hidden_state, self.head)

    def _capture(self, _module: Any, _args: Any, output: Any) -> None:
        self._captured.append(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TargetOutput:
        """The target's layers on packed documents; aux states stay alive to its end, as a target's hooks keep them."""
        self.decoder.config._attn_implementation = document_attention.BY_DOCUMENT
        with document_attention.packed_documents(batch.document_lengths(), batch.shard):
            embedded, positions = self.embed(batch.shard.local(batch.input_ids)), batch.shard.local(batch.positions)
            last = self.decoder(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        aux, self._captured = self._captured, []
        return TargetOutput(torch.cat(aux, dim=-1) if aux else last[..., :0], last)

    def states(self, rows: torch.Size) -> TargetOutput:
        """Arbitrary hidden states of B rows of L tokens."""
        aux, last = (
            torch.rand(*rows, n * self.head.shape[1], dtype=self.head.dtype, device=self.head.device)
            for n in (len(self.aux_layers), 1)
        )
        return TargetOutput(aux, last)

    def loss_and_gradient(self, plan: Any, states: TargetOutput) -> None:
        self.objective.loss(self.draft, plan, states, plan.counts).loss.backward()


def _decoder(config: Any, dtype: torch.dtype, layers: int, width: float) -> Any:
    """The first ``layers`` layers on the meta device, or a tensor-parallel rank's share ``width`` of each."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, None
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    if width < 1:
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(config, name, max(round(getattr(config, name) * width), 1))
    with META:
        return AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


class MicroBatch(NamedTuple):
    """FLOPs and bytes of a micro-batch on one rank."""

    tokens: int
    """Number of tokens, padding included."""
    flops: Counter[str]
    """FLOPs of "target", "target attention", "draft" (labels included) and "draft attention"."""
    forward_bytes: int
    """Peak of the target's forward, its output included."""
    output_bytes: int
    """Hidden states that the target computes: of whole rows where it cannot compute a rank's part of them."""
    states_bytes: int
    """Hidden states that the draft reads."""
    loss_bytes: int
    """Peak of the draft's loss and backward, the gradients of its weights included."""

    @property
    def target_flops(self) -> int:
        return self.flops["target"] + self.flops["target attention"]

    @property
    def draft_flops(self) -> int:
        return self.flops["draft"] + self.flops["draft attention"]


def count(
    job: TrainJob, config: Any, shape: DraftShape, batches: Sequence[Batch], device: torch.device, ranks: int = 1
) -> list[MicroBatch]:
    """Counts, as on ``device``, the first two of ``batches`` and the one with the most supervised tokens."""
    largest = max(range(len(batches)), key=lambda n: int(batches[n].loss_mask.sum()))
    width, context = job.backend.share_of_width(ranks), job.parallelism.context
    with _meta_runs_as(device):
        step = StepModels(job, config, shape, META, device.type, config.num_hidden_layers, width, context)
        step.draft.to(_dtype(job.trainer))
        return [_count_one(step, batches[n], job, width) for n in sorted({*range(len(batches))[:2], largest})]


def _count_one(step: StepModels, batch: Batch, job: TrainJob, width: float) -> MicroBatch:
    plan = step.objective.schedule(batch, META)
    read = batch if job.backend.WHOLE_ROWS else replace(batch, shard=plan.batch.shard)
    states = step.states(plan.batch.shard.local(batch.input_ids).shape)
    with Recorder("target") as forward:
        output = step.forward(read.to(META))
    with Recorder("draft") as loss:
        step.loss_and_gradient(plan, states)
    step.draft.zero_grad()
    return MicroBatch(
        tokens=states.last_hidden_state[..., 0].numel(),
        # Under tensor parallelism a rank computes its share of the layers for the rows of every rank of its group.
        flops=Counter({part: round(flops / width) for part, flops in forward.flops.items()}) + loss.flops,
        forward_bytes=forward.peak,
        output_bytes=output.aux_hidden_states.nbytes + output.last_hidden_state.nbytes,
        states_bytes=states.aux_hidden_states.nbytes + states.last_hidden_state.nbytes,
        loss_bytes=loss.peak,
    )


def _fused_attention(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, **options)[0]


@contextlib.contextmanager
def _meta_runs_as(device: torch.device) -> Iterator[None]:
    """Within the block, the meta device has the chunk sizes of ``device`` and fused attention, and sends nothing."""
    sizes = losses.LOGITS_PER_CHUNK, losses.LOGITS_PER_BLOCK, schedule.LABEL_CHUNK, document_attention.MAX_MASK_ELEMENTS
    patches: list[Any] = [patch.dict(table, meta=table[device.type]) for table in sizes]
    # On the meta device torch would choose the attention that makes all scores.
    patches.append(patch.object(document_attention, "scaled_dot_product_attention", _fused_attention))
    # transformers would read the positions; attention by document knows the documents already.
    patches.append(patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
    for collective in ("_all_gather", "_reduce_scatter"):
        patches.append(patch.object(context_parallel, collective, lambda *_, **__: None))
    with contextlib.ExitStack() as stack:
        for change in patches:
            stack.enter_context(change)
        yield


def peak_memory(
    job: TrainJob, models: Models, batch: MicroBatch, ranks: int, device_type: str, *, accumulates: bool,
    cached: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Bytes of tensors on one device, by part, in the phase of a step that takes the most (docs/scaling.md).

    Args:
        batch: the step's largest micro-batch.
        accumulates: whether a step has several micro-batches.
        cached: of a step that reads its hidden states from disk instead.
    """
    backend, dtype, draft_dtype = job.backend, _dtype(job.model), _dtype(job.trainer)
    shards = job.parallelism.sizes(ranks)[1] * job.parallelism.context
    stored = 0.0 if job.parallelism.offload and device_type == "cuda" else 1 / shards
    share = 0.0 if cached else backend.share_of_layers(ranks)
    table_share = share if backend.SHARDS_EMBEDDING_AND_HEAD and not cached else 1.0
    ahead = READ_AHEAD if cached else backend.ahead(ranks, device_type)
    wrapped = ranks > 1 or draft_dtype.itemsize < FLOAT32 or not stored
    weights = models.draft_parameters * FLOAT32
    copies = models.draft_parameters * draft_dtype.itemsize * wrapped  # FSDP computes with a gathered copy
    accumulated = weights * accumulates
    layers = (models.target - models.embedding_and_head) * dtype.itemsize
    table = models.table * dtype.itemsize * (0 < table_share < 1)  # embedding or head, gathered
    arriving = table * (2 if device_type == "cpu" else 1)  # gloo receives into a buffer of its own first
    gathered_layers = layers * backend.GATHERED_LAYERS / models.num_layers
    forward = max(batch.forward_bytes + (gathered_layers or table), arriving) if share else 0.0
    waiting = ahead * batch.states_bytes
    # The draft casts states of another dtype than its own.
    read = batch.states_bytes * (1 + (draft_dtype != dtype) * draft_dtype.itemsize / dtype.itemsize)
    # Under tensor parallelism a rank's own output waits while other ranks' rows are computed.
    own_output = batch.output_bytes if backend.share_of_width(ranks) < 1 and share else 0.0
    computing = waiting + own_output + (0.0 if ahead else forward)
    drafting = waiting + read + (forward if ahead else 0.0)
    phases: list[tuple[float, ...]] = [
        # Gathered table, copies of the draft, gradients, hidden states, activations and logits.
        (0.0, 2 * copies * (shards > 1), 0.0, computing, 0.0),  # the first micro-batch's forward
        (table, copies, accumulated, drafting, float(batch.loss_bytes)),
    ]
    if accumulates:
        phases.append((0.0, copies, accumulated, computing, 0.0))
    if table and not any(name.endswith("embed_tokens.weight") for name in models.draft):  # it embeds with the target's
        embedded = batch.states_bytes / (1 + len(job.draft.chosen_aux_layers(models.num_layers)))
        phases.append((table + arriving, copies, accumulated, drafting, embedded))
    if wrapped:  # ranks exchange gradients: unreduced ones, the send buffer, and this rank's part of the sum
        phases.append((0.0, 0.0, (accumulated or copies) + weights * (1 + 1 / shards), read + waiting, 0.0))
    entries = models.draft_parameters * (2 if job.optimizer.ema_decay is None else 3)
    if isinstance(job.optimizer, MuonConfig):  # keeps one moment of its matrices
        entries -= sum(x.numel() for n, x in models.draft.items() if len(x) == 2 and not n.endswith(NOT_HIDDEN))
    gathered, working, gradients, states, temporary = max(phases, key=sum)
    return {
        "target": models.embedding_and_head * dtype.itemsize * table_share + layers * share + gathered,
        "draft": weights * stored + working,
        "gradients and moments": entries * FLOAT32 * stored + gradients,
        "hidden states": states,
        "activations and logits": temporary,
    }


def overhead(parts: dict[str, float], device: torch.device) -> float:
    """Bytes that the process holds in addition to tensors, roughly."""
    temporary = parts["hidden states"] + parts["activations and logits"]
    return CPU_HEAP_SHARE * temporary + CPU_HEAP_BYTES if device.type == "cpu" else 0.0


class Rates(NamedTuple):
    """The time that this machine takes for each kind of work."""

    target: float
    """Seconds per FLOP of the target's forward."""
    draft: float
    """Seconds per FLOP of loss and backward; on a CPU the schedule takes time of the same cores, and is included."""
    update: float
    """Seconds for clipping and the optimizer's step."""


def step_seconds(batches: Sequence[MicroBatch], rates: Rates, micro_batches: int) -> tuple[float, float]:
    """Seconds of a step's target forwards, and of all else that it does, without communication between ranks.

    Args:
        batches: examples of its ``micro_batches``.
    """
    target = rates.target * statistics.mean(batch.target_flops for batch in batches)
    draft = rates.draft * statistics.mean(batch.draft_flops for batch in batches)
    return micro_batches * target, micro_batches * draft + rates.update


def measure(
    job: TrainJob, config: Any, shape: DraftShape, batch: Batch, counted: MicroBatch, device: torch.device
) -> Rates:
    """Runs pieces of a step on arbitrary weights for a few seconds; ``counted`` sizes them."""
    size, layer_flops = PIECE_FLOPS[device.type], counted.target_flops / config.num_hidden_layers
    layers = min(max(int(size / layer_flops), 1), config.num_hidden_layers)
    step, dtype = StepModels(job, config, shape, device, device.type, layers), _dtype(job.trainer)
    optimizers, parameters = build_optimizers(job.optimizer, step.draft), list(step.draft.parameters())
    gradients = [torch.full_like(p, 1e-3) for p in parameters]

    def update() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            # Below float32 there is also a copy to compute with, and the gradients' way back.
            p.grad = gradient if dtype == p.dtype else p.detach().to(dtype).float()
        titan.clip_grad_norm_(parameters, job.optimizer.clip_norm)
        optimizers.step()
        optimizers.zero_grad()

    def loss_and_gradient() -> None:
        # On a CPU the schedule takes time of the same cores; on CUDA the host makes it meanwhile.
        step.loss_and_gradient(step.objective.schedule(piece) if device.type == "cpu" else plan, states)
        step.draft.zero_grad()

    with fast_float32_matmuls(device):
        update_seconds = _seconds(update, device)
        step.draft.to(dtype)
        target_piece = piece_of(batch, size / (layers * layer_flops)).to(device)
        piece = piece_of(batch, size / counted.draft_flops)
        plan, states = step.objective.schedule(piece, device), step.states(piece.input_ids.shape)
        target_rate = _seconds_per_flop(lambda: step.forward(target_piece), device)
        return Rates(target_rate, _seconds_per_flop(loss_and_gradient, device), update_seconds)


def piece_of(batch: Batch, share: float) -> Batch:
    """About ``share`` of a batch, as one row: its first documents, the last one cut to an equally supervised part."""
    left, row = max(int(share * batch.num_tokens), SHORTEST_PIECE), list[TokenRow]()
    for span in batch.spans:
        ids, mask = (x[span.row, span.start : span.end] for x in (batch.input_ids, batch.loss_mask))
        width, before = min(left, len(ids)), pad(mask.cumsum(0), (1, 0))
        start = int((before[width:] - before[:-width] - before[-1] * width / len(ids)).abs().argmin())
        cut = slice(start, start + width)
        row.append(TokenRow(span.id, ids[cut].tolist(), mask[cut].tolist(), origin=""))
        left -= width
        if not left:
            break
    return collate([row], sum(len(document.input_ids) for document in row), pad_id=0)


def _seconds_per_flop(run: Callable[[], Any], device: torch.device) -> float:
    with Recorder("piece") as recorder:
        run()
    return _seconds(run, device) / recorder.flops.total()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of a few runs after a warm-up, which counts only where it took long enough to be the only one."""
    times: list[float] = []
    while len(times) <= PIECE_RUNS and sum(times) < PIECE_SECONDS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def _dtype(config: Any) -> torch.dtype:
    return getattr(torch, config.dtype.value)
