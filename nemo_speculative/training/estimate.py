"""Time and memory of a training step, estimated without loading weights (``plan=true``).

The step's own code runs on the meta device (shapes and dtypes, no data): a recorder counts the FLOPs of every product
and the bytes of all tensors that are alive.  Seconds follow from a piece of the step that runs for real on random
weights: its seconds per FLOP, times the FLOPs of the whole.
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
from torch.utils.flop_counter import bmm_flop, flop_registry, mm_flop, sdpa_flop
from transformers import AutoModel, AutoModelForCausalLM, masking_utils

from nemo_speculative.algorithms.common import losses, schedule
from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.config.schema import READ_AHEAD, MuonConfig, TrainJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.context_parallel import ChunkPairShard, ContextGroup, ContextShard
from nemo_speculative.distributed.parallelism import fast_float32_matmuls
from nemo_speculative.targets import document_attention
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.document_attention import BY_DOCUMENT, packed_documents
from nemo_speculative.training.optimizer import NOT_HIDDEN, build_optimizers

META = torch.device("meta")
FLOAT32 = 4
PROBE_SECONDS, PROBE_RUNS, PROBE_WIDTH, SHORTEST_PIECE = 0.6, 3, 1024, 256
"""Aim for one run of a piece; runs; width of the matrix product that sizes pieces; tokens of the smallest piece."""
EFFICIENCY = 0.5
"""Share of that product's speed that a step reaches, to size the pieces."""
TABLE_ROWS = 1024
"""Rows of the embedding that stands in for the target's."""
COUNTED_BATCHES = 3
CPU_HEAP_SHARE, CPU_HEAP_BYTES = 0.25, 60e6
"""Memory that a CPU's allocator leaves unused between blocks, as a share of temporary tensors, and that libraries take
at first use: roughly calibrated by ``python -m benchmarks.plan --cases tiny,S-50,M-50``, not counted."""


def _attention_flops(query: Any, key: Any, value: Any, dropout_p: float = 0, is_causal: bool = False, **_: Any) -> int:
    """A causal call computes about half of the scores."""
    return sdpa_flop(query.shape, key.shape, value.shape) // (2 if is_causal else 1)


FLOPS: dict[Any, Callable[..., int]] = {
    # torch's table lacks products in place, which add up the head's gradient, and the CPU's attention.
    torch.ops.aten.addmm_: lambda _, a, b, **__: mm_flop(a.shape, b.shape),
    torch.ops.aten.baddbmm_: lambda _, a, b, **__: bmm_flop(a.shape, b.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


class Recorder(TorchDispatchMode):
    """Counts the FLOPs, and the bytes of tensors alive, of all that runs within it.

    Attributes:
        flops: by ``part``, which the caller may change; batched products apart, as "<part> attention".
        peak: the most bytes alive at once of tensors made within.
    """

    def __init__(self, part: str):
        super().__init__()
        self.part, self.flops, self.live, self.peak = part, Counter[str](), 0, 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, packet = function(*args, **(kwargs or {})), function._overloadpacket
        if function._schema.returns and function._schema.returns[0].alias_info is None:
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self._track(tensor.untyped_storage())
        if packet in FLOPS or packet in flop_registry:
            own = FLOPS.get(packet)
            flops = own(*args, **kwargs or {}) if own else flop_registry[packet](*args, **kwargs or {}, out_val=output)
            batched = "bmm" in str(packet) or "attention" in str(packet)
            self.flops[f"{self.part} attention" if batched else self.part] += flops
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


class StandIn:
    """Embedding and head of a target, with weights of no meaning."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device):
        self.table = torch.rand(TABLE_ROWS, config.hidden_size, dtype=dtype, device=device)
        self.head = torch.full((config.vocab_size, config.hidden_size), 0.01, dtype=dtype, device=device)
        self.recorder: Recorder | None = None

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embedding(input_ids % TABLE_ROWS, self.table)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        if self.recorder is None or torch.is_grad_enabled():
            return linear(last_hidden_state, self.head)
        self.recorder.part, part = "labels", self.recorder.part
        logits = linear(last_hidden_state, self.head)
        self.recorder.part = part
        return logits


class _PlannedShard(ChunkPairShard):
    """A rank's part of rows that it shares: allocates what its collectives do, and sends nothing."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        received = x.new_empty(2 * self._padded_length * self.group.size(), x.shape[1])
        return received[: self.num_tokens].clone()

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        sent = x.new_empty(2 * self._padded_length * self.group.size(), x.shape[1], dtype=torch.float32)
        received = sent[: 2 * self._padded_length].clone()
        return received.new_empty(len(self._positions), x.shape[1], dtype=x.dtype)


class _PlannedGroup(ContextGroup):
    def shard(self, num_tokens: int, halo: int) -> ContextShard:
        shard: Any = super().shard(num_tokens, halo)
        return _PlannedShard(shard.group, None, num_tokens, halo)


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


class MicroBatch(NamedTuple):
    """FLOPs and bytes of a micro-batch on one rank."""

    tokens: int
    """Number of tokens, padding included."""
    flops: Counter[str]
    """FLOPs of "target", "target attention", "labels" (the target's head), "draft" and "draft attention"."""
    forward_bytes: int
    """Peak of the target's forward, its output included."""
    output_bytes: int
    """Hidden states that the target computes: of whole rows where it cannot compute a rank's part of them."""
    states_bytes: int
    """Hidden states that the draft reads."""
    embedded_bytes: int
    """Embeddings of its tokens, from the target's table."""
    loss_bytes: int
    """Peak of the draft's loss and backward, the gradients of its weights included."""

    @property
    def target_flops(self) -> int:
        return self.flops["target"] + self.flops["target attention"]

    @property
    def draft_flops(self) -> int:
        return self.flops.total() - self.target_flops


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


def count(
    job: TrainJob, config: Any, shape: DraftShape, batches: Sequence[Batch], device: torch.device, ranks: int = 1
) -> list[MicroBatch]:
    """Counts, as on ``device``, the first few of ``batches`` and the one with the most supervised tokens."""
    largest = max(range(len(batches)), key=lambda n: int(batches[n].loss_mask.sum()))
    with _meta_runs_as(device):
        chosen = sorted({*range(min(len(batches), COUNTED_BATCHES - 1)), largest})
        return [_count_one(job, config, shape, batches[n], device, ranks) for n in chosen]


def _count_one(
    job: TrainJob, config: Any, shape: DraftShape, batch: Batch, device: torch.device, ranks: int
) -> MicroBatch:
    aux_layers = job.draft.chosen_aux_layers(config.num_hidden_layers)
    dtype = _dtype(job.model)
    width = job.backend.share_of_width(ranks)
    with META:
        target = StandIn(config, dtype, META)
        draft = get_class(job.draft._target_)(shape).attach(target).to(_dtype(job.trainer))
        decoder = AutoModel.from_config(_narrow(config, width), attn_implementation="sdpa", dtype=dtype).eval()
    objective = _objective(job, target, shape, device)
    plan = objective.schedule(batch, META)
    whole = batch if job.backend.WHOLE_ROWS else replace(batch, shard=plan.batch.shard)
    with Recorder("target") as forward, torch.no_grad():
        output = _forward(decoder, target, whole.to(META), whole.document_lengths(), aux_layers)
    # Under tensor parallelism a rank computes its share of the layers for the rows of every rank of its group.
    target_flops = Counter({part: round(flops / width) for part, flops in forward.flops.items()})
    rows = plan.batch.shard.local(batch.input_ids).shape
    widths = len(aux_layers) * config.hidden_size, config.hidden_size
    states = TargetOutput(*(torch.empty(*rows, n, dtype=dtype, device=META) for n in widths))
    target.recorder = loss = Recorder("draft")
    with loss:
        objective.loss(draft, plan, states, plan.counts).loss.backward()
    return MicroBatch(
        tokens=rows.numel(),
        flops=target_flops + loss.flops,
        forward_bytes=forward.peak,
        output_bytes=sum(x.nbytes for x in (output.aux_hidden_states, output.last_hidden_state)),
        states_bytes=sum(x.nbytes for x in (states.aux_hidden_states, states.last_hidden_state)),
        embedded_bytes=states.last_hidden_state.nbytes,
        loss_bytes=loss.peak,
    )


def _objective(job: TrainJob, target: Any, shape: DraftShape, device: torch.device, context: bool = True) -> Any:
    ranks = job.parallelism.context
    group = {"context": _PlannedGroup(ContextGroup.planned(ranks).group)} if context and ranks > 1 else {}
    slots = job.trainer.slots(shape.hidden_size, device.type)
    objective: Any = get_class(job.draft.objective)
    return objective(target, job.draft, seed=job.seed, tau_steps=1, chunk_slots=slots, **group)


def _forward(
    decoder: Any, target: StandIn, batch: Batch, lengths: Sequence[int], aux_layers: Sequence[int]
) -> TargetOutput:
    """The decoder on packed documents; aux states stay alive to its end, as a target's hooks keep them."""
    captured: list[torch.Tensor] = []

    def capture(_module: Any, _args: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)

    hooks = [decoder.layers[i].register_forward_hook(capture) for i in aux_layers if i < len(decoder.layers)]
    decoder.config._attn_implementation = BY_DOCUMENT
    with packed_documents(lengths, batch.shard):
        embedded, position_ids = target.embed(batch.shard.local(batch.input_ids)), batch.shard.local(batch.positions)
        last = decoder(inputs_embeds=embedded, position_ids=position_ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return TargetOutput(torch.cat(captured, dim=-1) if captured else last[..., :0], last)


def _narrow(config: Any, width: float) -> Any:
    """The configuration of one rank's share of every layer under tensor parallelism."""
    if width == 1:
        return config
    part = copy.deepcopy(config)
    part.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(part, name, max(round(getattr(config, name) * width), 1))
    return part


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, is_causal: bool, scale: float | None
) -> torch.Tensor:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def _meta_runs_as(device: torch.device) -> Iterator[None]:
    """Within the block, the meta device computes in chunks of the sizes of ``device`` and with fused attention."""
    sizes = losses.LOGITS_PER_CHUNK, losses.LOGITS_PER_BLOCK, schedule.LABEL_CHUNK, document_attention.MAX_MASK_ELEMENTS
    with contextlib.ExitStack() as stack:
        for table in sizes:
            stack.enter_context(patch.dict(table, meta=table[device.type]))
        # On the meta device torch would choose the attention that makes all scores.
        stack.enter_context(patch.object(document_attention, "scaled_dot_product_attention", _fused_attention))
        # transformers would read the positions; attention by document knows the documents already.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
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
    read, waiting = float(batch.states_bytes), ahead * batch.states_bytes
    if draft_dtype != dtype:  # the draft casts its input
        read += batch.states_bytes * draft_dtype.itemsize / dtype.itemsize
    # Under tensor parallelism a rank's own output waits while other ranks' rows are computed.
    own_output = batch.output_bytes if backend.share_of_width(ranks) < 1 and share else 0.0
    computing = waiting + own_output + (0.0 if ahead else forward)
    drafting = waiting + read + (forward if ahead else 0.0)
    phases = [
        # Gathered table, copies of the draft, gradients, hidden states, activations and logits.
        (0.0, 2 * copies * (shards > 1), 0.0, computing, 0.0),  # the first micro-batch's forward
        (0.0, copies, accumulated, computing, 0.0) if accumulates else (0.0,) * 5,
        (table + arriving, copies, accumulated, drafting, float(batch.embedded_bytes) if table else 0.0),
        (table, copies, accumulated, drafting, float(batch.loss_bytes)),
    ]
    if wrapped:  # ranks exchange gradients: unreduced ones, the send buffer, and this rank's part of the sum
        phases.append((0.0, 0.0, (accumulated or copies) + weights * (1 + 1 / shards), read + waiting, 0.0))
    if any(name.endswith("embed_tokens.weight") for name in models.draft):
        del phases[2]
    entries = 2 * models.draft_parameters
    if isinstance(job.optimizer, MuonConfig):  # keeps one moment of its matrices
        entries -= sum(x.numel() for n, x in models.draft.items() if len(x) == 2 and not n.endswith(NOT_HIDDEN))
    entries += 0 if job.optimizer.ema_decay is None else models.draft_parameters
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
    """Seconds per FLOP of loss and backward, labels included."""
    schedule: float
    """Seconds per token of a batch, on the host."""
    update: float
    """Seconds for clipping and the optimizer's step."""


def step_seconds(
    batches: Sequence[MicroBatch], rates: Rates, micro_batches: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of a step's target forwards, and of all else that it does, without communication between ranks.

    Args:
        batches: examples of its ``micro_batches``.
    """
    target, draft, tokens = (
        sum(values) / len(batches) * micro_batches
        for values in zip(*((b.target_flops, b.draft_flops, b.tokens) for b in batches), strict=True)
    )
    # On CUDA the host makes the next schedule meanwhile; on a CPU that takes time of the products.
    schedules = 0.0 if device.type == "cuda" else rates.schedule * tokens
    return target * rates.target, draft * rates.draft + schedules + rates.update


def measure(
    job: TrainJob, config: Any, shape: DraftShape, batch: Batch, counted: MicroBatch, device: torch.device
) -> Rates:
    """Runs pieces of a step on random weights for a few seconds; ``counted`` sizes them."""
    dtype, draft_dtype = _dtype(job.model), _dtype(job.trainer)
    aux_layers, num_layers = job.draft.chosen_aux_layers(config.num_hidden_layers), config.num_hidden_layers
    stand_in = StandIn(config, dtype, device)
    with device:
        draft = get_class(job.draft._target_)(shape).attach(stand_in)
    objective = _objective(job, stand_in, shape, device, context=False)
    with fast_float32_matmuls(device):
        update = _seconds(_update(job, draft), device)
        draft.to(draft_dtype)
        budget = _flops_of_a_probe(dtype, device)
        layers = min(max(int(budget / counted.target_flops * num_layers), 1), num_layers)
        piece = piece_of(batch, budget / (counted.target_flops * layers / num_layers))
        lengths, moved, decoder = (
            piece.document_lengths(),
            piece.to(device),
            _random_decoder(config, layers, dtype, device),
        )
        forward = torch.no_grad()(lambda: _forward(decoder, stand_in, moved, lengths, aux_layers))
        target_rate = _seconds_per_flop(forward, device)
        piece = piece_of(batch, _flops_of_a_probe(draft_dtype, device) / counted.draft_flops)
        plan, widths = objective.schedule(piece, device), (len(aux_layers) * config.hidden_size, config.hidden_size)
        states = TargetOutput(*(torch.rand(*piece.input_ids.shape, n, dtype=dtype, device=device) for n in widths))

        def loss_and_gradient() -> None:
            objective.loss(draft, plan, states, plan.counts).loss.backward()
            draft.zero_grad()

        draft_rate = _seconds_per_flop(loss_and_gradient, device)
        schedule_seconds = _seconds(lambda: objective.schedule(batch), device)
    return Rates(target_rate, draft_rate, schedule_seconds / batch.num_tokens, update)


def _random_decoder(config: Any, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The first layers of a decoder with constant weights; its embedding stays on the meta device, unused."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    with META:
        decoder = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
    for module in decoder.modules():
        if module is not decoder.get_input_embeddings():
            module.to_empty(device=device, recurse=False)
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        tensor.data.fill_(0.01)
    return decoder.eval()


def _update(job: TrainJob, draft: Any) -> Callable[[], None]:
    """Clipping and a step of the optimizer; below float32 also the copy to compute with and the gradients' way back."""
    optimizers, parameters = build_optimizers(job.optimizer, draft), list(draft.parameters())
    gradients, dtype = [torch.full_like(p, 1e-3) for p in parameters], _dtype(job.trainer)

    def update() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient if dtype == p.dtype else p.detach().to(dtype).float()
        titan.clip_grad_norm_(parameters, job.optimizer.clip_norm)
        optimizers.step()
        optimizers.zero_grad()

    return update


def piece_of(batch: Batch, share: float) -> Batch:
    """About ``share`` of a batch: some of its rows, or the part of its first row supervised as densely as the row."""
    rows, length = batch.input_ids.shape
    if share >= 1:
        return batch
    count, start, width = int(share * rows), 0, length
    if not count:
        count, width = 1, min(max(int(share * rows * length), SHORTEST_PIECE), length)
        before = pad(batch.loss_mask[0].cumsum(0), (1, 0))
        supervised = before[width:] - before[:-width]
        start = int((supervised - float(before[-1]) * width / length).abs().argmin())
    cut = slice(0, count), slice(start, start + width)
    documents, positions = batch.documents[cut], batch.positions[cut]
    positions = positions - positions[:, :1] * (documents == documents[:, :1])  # documents that are cut start at 0
    spans = tuple(
        replace(span, start=max(span.start - start, 0), end=min(span.end - start, width))
        for span in batch.spans
        if span.row < count and span.start < start + width and span.end > start
    )
    return Batch(batch.input_ids[cut], batch.loss_mask[cut], positions, documents, spans)


def _flops_of_a_probe(dtype: torch.dtype, device: torch.device) -> float:
    a, b = torch.rand(2, PROBE_WIDTH, PROBE_WIDTH, device=device).to(dtype)
    return PROBE_SECONDS * EFFICIENCY * 2 * PROBE_WIDTH**3 / _seconds(lambda: a @ b, device)


def _seconds_per_flop(run: Callable[[], Any], device: torch.device) -> float:
    with Recorder("run") as recorder:
        run()
    return _seconds(run, device) / recorder.flops.total()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of a few runs after a warm-up, which counts only where it took long enough to be the only one."""
    times: list[float] = []
    while len(times) <= PROBE_RUNS and sum(times) < PROBE_RUNS * PROBE_SECONDS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def _dtype(config: Any) -> torch.dtype:
    return getattr(torch, config.dtype.value)
