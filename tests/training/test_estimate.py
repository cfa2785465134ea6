"""The estimate of a step, compared with the FLOPs and bytes of real steps."""

import dataclasses
import os
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra.utils import get_class
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop
from transformers import LlamaConfig

from benchmarks.training_step.worker import peak_of_tensors
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import (
    READ_AHEAD,
    DepthSampling,
    Eagle3DraftConfig,
    EagleDraftConfig,
    FeatureNoise,
    FeaturesBackendConfig,
    HFBackendConfig,
    MuonConfig,
    OptimizerConfig,
    ParallelismConfig,
    RemoteBackendConfig,
    SGLangBackendConfig,
    ShardedHFBackendConfig,
    TensorParallelHFBackendConfig,
    TrainJob,
)
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import context_group, mesh, shard_draft, start_unshard
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.training import estimate
from nemo_speculative.training.estimate import piece_of
from nemo_speculative.training.optimizer import WeightAverage, build_optimizers
from nemo_speculative.training.trainer import TTTModule
from tests.conftest import make_target
from tests.training.ranks import on_ranks

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
EAGLE3 = Eagle3DraftConfig(ttt_steps=4, vocab_size=200)
EAGLE1 = EagleDraftConfig(ttt_steps=1, noise=FeatureNoise.none)
DRAFTS: dict[str, Any] = {
    "EAGLE-3": EAGLE3,
    "EAGLE-3.1": dataclasses.replace(EAGLE3, fc_norm=True, norm_output=True),
    "three layers": dataclasses.replace(EAGLE3, num_layers=3),
    "own embedding": dataclasses.replace(EAGLE3, hidden_size=48),
    "head of the target": dataclasses.replace(EAGLE3, vocab_size="target_head"),
    "sampled depths": dataclasses.replace(EAGLE3, depth_sampling=DepthSampling.geometric),
    "EAGLE-1": EAGLE1,
    "EAGLE-1, two steps": dataclasses.replace(EAGLE1, ttt_steps=2),
}
LARGE_HEAD = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=64, num_hidden_layers=7, num_attention_heads=1,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
EAGLE3_LARGE = dataclasses.replace(EAGLE3, ttt_steps=1, vocab_size=4096, intermediate_size=64, aux_layers=[3])
# The counter knows no product in place, and ours adds up gradients that way.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: mm_flop(a, b),
    torch.ops.aten.baddbmm_: lambda _, a, b, out_shape=None, **__: bmm_flop(a, b),
}
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
"""Parameters of a layer of it."""
CPU = torch.device("cpu")


class FrozenStandIn:
    """The target's embedding and head, without modules: the counter's hooks do not go with gradients inside a step."""

    def __init__(self, config):
        self.table, self.head = torch.randn(2, config.vocab_size, config.hidden_size) * 0.1

    def embed(self, ids):
        return embedding(ids, self.table)

    def logits(self, hidden):
        return linear(hidden, self.head)


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once of tensors made within."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            self._track(x, is_new=False)
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self._track(x, is_new=True)
        return out

    def _track(self, x, is_new):
        if not isinstance(x, torch.Tensor) or id(x.untyped_storage()) in self._known:
            return
        storage = x.untyped_storage()
        size = storage.nbytes() * is_new
        self._known.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.live -= size


def batch_of(*lengths, rows=1, answered=0.6):
    """Rows of these documents, the last part of each supervised."""
    row = []
    for n in lengths:
        prompt = round((1 - answered) * n)
        row.append(TokenRow(f"{n}", [i % 300 for i in range(n)], [False] * prompt + [True] * (n - prompt), ""))
    return collate([row] * rows, sum(lengths), 0)


def make(config, chunk_slots=None, of=CONFIG, **changes):
    """A draft, its objective, and the job that trains it for a target of the configuration ``of``."""
    torch.manual_seed(0)
    cls: Any = get_class(config._target_)
    aux = config.chosen_aux_layers(of.num_hidden_layers)
    entries = config.vocabulary(of.vocab_size)
    shape = cls.shape_for(config, of, aux, entries.entries if entries.own_head else None)
    target = FrozenStandIn(of)
    objective_class: Any = get_class(config.objective)
    objective = objective_class(target, config, seed=0, tau_steps=1, chunk_slots=chunk_slots)
    job = TrainJob(draft=config, **changes)
    job.trainer = dataclasses.replace(job.trainer, ttt_chunk_slots=chunk_slots)
    return cls(shape).attach(target), objective, job


def states_of(batch, aux, of=CONFIG):
    rows, h = batch.input_ids.shape, of.hidden_size
    return TargetOutput(torch.randn(*rows, aux * h), torch.randn(*rows, h))


def estimated(config, batch, chunk_slots=None, of=CONFIG, ranks=1, device_type="cpu", accumulates=False, **changes):
    """Bytes at the peak of a step, by part."""
    cached = changes.pop("cached", False)
    draft, _, job = make(config, chunk_slots, of, **changes)
    models = estimate.size_models(job, of, draft.shape)
    (counted,) = estimate.count(job, of, draft.shape, [batch], CPU, ranks)
    return estimate.peak_memory(job, models, counted, ranks, device_type, accumulates=accumulates, cached=cached)


@pytest.mark.parametrize("chunk_slots", [None, 192], ids=["one chunk", "several"])
@pytest.mark.parametrize("name", DRAFTS)
def test_flops_and_bytes_of_a_loss_and_its_gradient_are_those_of_a_real_one(name, chunk_slots):
    draft, objective, job = make(DRAFTS[name], chunk_slots)
    batch = batch_of(300, 150, 62, rows=2)
    plan, states = objective.schedule(batch), states_of(batch, len(DRAFTS[name].chosen_aux_layers(7)))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        objective.loss(draft, plan, states, plan.counts).loss.backward()
    draft.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        objective.loss(draft, plan, states, plan.counts).loss.backward()
    (counted,) = estimate.count(job, CONFIG, draft.shape, [batch], CPU)
    assert counted.draft_flops == counter.get_total_flops()
    # A draft of several layers makes its mask of the lower ones in the first step, from the host's positions.
    assert counted.loss_bytes == pytest.approx(live.peak, rel=0.03)


def test_flops_and_bytes_of_the_targets_forward_are_those_of_a_real_one(tmp_path):
    target = get_class(HFBackendConfig()._target_)(make_target(tmp_path, num_layers=7), aux_layers=None)
    draft, _, job = make(EAGLE3, of=target.config)
    batch = batch_of(300, 212)
    (counted,) = estimate.count(job, target.config, draft.shape, [batch], CPU)
    with LiveBytes() as live, torch.no_grad():
        output = target.compute_hidden_states(batch)
    assert counted.forward_bytes == pytest.approx(live.peak, rel=0.05)
    assert counted.output_bytes == output.aux_hidden_states.nbytes + output.last_hidden_state.nbytes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for n in (300, 212):
            target.model.model(torch.zeros(1, n, dtype=torch.long), use_cache=False)
    assert counted.flops["target"] == counter.get_total_flops()
    config, squares = target.config, 300**2 + 212**2
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or 32 // config.num_attention_heads)
    # Causality leaves half of the scores; shorter documents are padded where they share a call.
    assert counted.flops["target attention"] == pytest.approx(2 * 7 * width * squares, rel=0.02)


def test_memory_grows_no_faster_than_a_conversation():
    totals = [sum(estimated(EAGLE3, batch_of(n)).values()) for n in (1024, 2048, 4096)]
    assert all(before < after <= 2 * before for before, after in pairwise(totals))


def test_memory_rises_with_supervised_tokens_and_falls_with_smaller_chunks_and_shards():
    few, many = (estimated(EAGLE3, batch_of(2048, answered=share)) for share in (0.2, 0.9))
    assert sum(few.values()) < sum(many.values())
    whole, chunks = (estimated(EAGLE3, batch_of(2048, answered=0.9), n) for n in (2048, 256))
    assert chunks["activations and logits"] < 0.6 * whole["activations and logits"]
    replicated, sharded = (
        estimated(EAGLE3, batch_of(2048, answered=0.9), ranks=4, parallelism=layout)
        for layout in (ParallelismConfig(replicate=-1), ParallelismConfig(shard=-1))
    )
    sizes = sum(p.numel() for p in make(EAGLE3)[0].parameters())
    assert sum(replicated.values()) - sum(sharded.values()) == 3 / 4 * 12 * sizes, "weights and two moments"


def test_muon_keeps_one_moment_of_its_matrices_and_an_average_is_a_copy_more():
    moments = {
        name: estimated(EAGLE3, batch_of(512), optimizer=config)["gradients and moments"]
        for name, config in (
            ("adamw", OptimizerConfig()), ("muon", MuonConfig()), ("average", OptimizerConfig(ema_decay=0.9)),
        )
    }  # fmt: skip
    sizes = {name: p.numel() for name, p in make(EAGLE3)[0].named_parameters()}
    hidden = sum(n for name, n in sizes.items() if n > 1000 and "lm_head" not in name)
    assert moments["adamw"] - moments["muon"] == 4 * hidden
    assert moments["average"] - moments["adamw"] == 4 * sum(sizes.values())


def test_training_from_hidden_states_on_disk_needs_neither_the_targets_layers_nor_its_time():
    draft, _, job = make(EAGLE3)
    batch = batch_of(300, 212)
    counted = estimate.count(job, CONFIG, draft.shape, [batch, batch], CPU)
    rates = estimate.Rates(target=1e-9, draft=2e-9, update=0.5)
    target, others = estimate.step_seconds(counted, rates, 3)
    assert target == pytest.approx(3e-9 * counted[0].target_flops)
    assert others == pytest.approx(3 * 2e-9 * counted[0].draft_flops + 0.5)
    online, cached = (estimated(EAGLE3, batch, cached=cached) for cached in (False, True))
    layers = estimate.size_models(job, CONFIG, draft.shape)
    assert online["target"] - cached["target"] == 4 * (layers.target - layers.embedding_and_head)
    assert cached["hidden states"] - online["hidden states"] == READ_AHEAD * counted[0].states_bytes


@pytest.mark.parametrize(
    ("backend", "layers"),
    [
        (HFBackendConfig(), 7),
        (ShardedHFBackendConfig(), 7 / 4),
        (TensorParallelHFBackendConfig(), 7 / 4),
        (TensorParallelHFBackendConfig(tp_size=2), 7 / 2),
    ],
    ids=["replicated", "sharded", "tensor-parallel", "in groups"],
)
def test_a_device_holds_its_part_of_the_target(backend, layers, monkeypatch):
    """And where embedding and head are sharded, the gathered head, if the draft's loss is the peak."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    of = LlamaConfig(**CONFIG.to_dict() | {"num_key_value_heads": 4})
    sharded = ParallelismConfig(shard=-1)
    stored = estimated(EAGLE3, batch_of(64), of=of, ranks=4, backend=backend, parallelism=sharded)["target"]
    layer = LAYER + 2 * 64 * 32
    tables = 2 * layers / 7 + (layers < 7)
    assert stored == pytest.approx(4 * (tables * 300 * 64 + layers * layer), rel=1e-3)


@pytest.mark.parametrize("chunk_slots", [None, 64], ids=["one chunk", "several"])
def test_the_targets_embedding_is_gathered_for_a_draft_that_has_none_of_its_own(chunk_slots, monkeypatch):
    """Embedding and head outweigh all else here, so that they would be the peak."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    table, stored, moments = 4 * LARGE_HEAD.vocab_size * LARGE_HEAD.hidden_size, [], []
    for hidden_size in (None, 64):
        config = dataclasses.replace(EAGLE3_LARGE, vocab_size=200, hidden_size=hidden_size)
        parts = estimated(
            config, batch_of(200, answered=0.9), chunk_slots, LARGE_HEAD, ranks=2, backend=ShardedHFBackendConfig(),
            parallelism=ParallelismConfig(replicate=-1),
        )  # fmt: skip
        draft, _, job = make(config, chunk_slots, LARGE_HEAD)
        models = estimate.size_models(job, LARGE_HEAD, draft.shape)
        stored.append(parts["target"] - 4 * models.target / 2)
        moments.append(parts["gradients and moments"] - 8 * models.draft_parameters)
    assert stored[0] == 3 * table, "on a CPU the embedding exists twice as it arrives, next to the head"
    assert stored[1] <= table
    assert moments[0] == 0, "no chunk has run yet, whose gradients would wait"


@pytest.mark.parametrize(
    ("backend", "ranks", "on_cuda", "on_cpu"),
    [
        (HFBackendConfig(), 2, 1, 0),
        (ShardedHFBackendConfig(), 2, 0, 0),
        (TensorParallelHFBackendConfig(), 2, 0, 0),
        (SGLangBackendConfig(), 1, 1, 0),
        (SGLangBackendConfig(), 2, 0, 0),
        (FeaturesBackendConfig(), 2, READ_AHEAD, READ_AHEAD),
        (RemoteBackendConfig(urls=["http://a:1", "http://b:1", "http://c:1"]), 2, 3, 3),
    ],
)
def test_micro_batches_ahead_are_those_asked_for_or_on_a_gpu_the_next(backend, ranks, on_cuda, on_cpu):
    assert [backend.ahead(ranks, device) for device in ("cuda", "cpu")] == [on_cuda, on_cpu]


def test_a_gpu_holds_the_next_micro_batchs_states_and_forward_while_the_draft_works():
    draft, _, job = make(EAGLE3)
    (counted,) = estimate.count(job, CONFIG, draft.shape, [batch_of(512)], CPU)
    ahead, alone = (estimated(EAGLE3, batch_of(512), device_type=device)["hidden states"] for device in ("cuda", "cpu"))
    assert alone == counted.states_bytes == 4 * 512 * (3 + 1) * 64
    assert ahead - alone == counted.states_bytes + counted.forward_bytes


def test_gradients_of_earlier_micro_batches_wait():
    once, accumulated = (estimated(EAGLE3, batch_of(512), accumulates=x) for x in (False, True))
    sizes = sum(p.numel() for p in make(EAGLE3)[0].parameters())
    assert sum(accumulated.values()) - sum(once.values()) == 4 * sizes


SHAPES: dict[str, dict[str, int]] = {
    "states": {"hidden_size": 512, "intermediate_size": 64, "head_dim": 16},
    "MLP": {"hidden_size": 64, "intermediate_size": 1024},
    "heads": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64},
    "vocabulary": {"hidden_size": 512, "intermediate_size": 64, "head_dim": 16, "vocab_size": 8192},
}
"""Targets, by what is wide in them."""
HEAVY = dataclasses.replace(EAGLE3, ttt_steps=1, intermediate_size=1024)
FLAT = dataclasses.replace(EAGLE3, ttt_steps=1, intermediate_size=64)
NARROW = dataclasses.replace(EAGLE3, intermediate_size=128)
SHARED = ParallelismConfig(shard=-1, context=2)
FULL_BATCH, DIVIDED, SHARDED = HFBackendConfig(), TensorParallelHFBackendConfig(), ShardedHFBackendConfig()
LAYOUTS: dict[str, tuple[str, ParallelismConfig, Any, Any, int, float]] = {
    "FSDP2": ("states", ParallelismConfig(shard=-1), FULL_BATCH, HEAVY, 16, 0.6),
    "DDP": ("states", ParallelismConfig(replicate=-1), FULL_BATCH, HEAVY, 16, 0.6),
    "averaged": ("states", ParallelismConfig(replicate=-1), FULL_BATCH, HEAVY, 16, 0.6),
    "shared": ("MLP", SHARED, FULL_BATCH, NARROW, 2048, 0.6),
    "shared, few slots": ("MLP", SHARED, FULL_BATCH, NARROW, 2048, 0.02),
    "shared, divided": ("MLP", SHARED, DIVIDED, NARROW, 2048, 0.6),
    "shared, divided, few slots": ("MLP", SHARED, DIVIDED, NARROW, 2048, 0.02),
    "divided ends": ("vocabulary", ParallelismConfig(shard=-1), DIVIDED, FLAT, 16, 0.6),
    "sharded ends": ("vocabulary", ParallelismConfig(shard=-1), SHARDED, FLAT, 16, 0.6),
    "ends and a long row": ("vocabulary", ParallelismConfig(shard=-1), SHARDED, FLAT, 1024, 0.6),
    "shared, divided heads": ("heads", SHARED, DIVIDED, dataclasses.replace(NARROW, ttt_steps=1), 2048, 0.005),
}
"""Shape of the target, how two ranks hold it and which draft, tokens of the row, and the share that is an answer."""


def peaks(folder):
    """Estimated and measured bytes at the peak of a step on this rank, by layout."""
    titan.bind_device("cpu")
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    return {name: estimated_and_measured(name, folder) for name in LAYOUTS}


def estimated_and_measured(name, folder):
    shape, parallelism, backend, config, tokens, answered = LAYOUTS[name]
    optimizer = OptimizerConfig(ema_decay=0.9 if name == "averaged" else None)
    job = TrainJob(draft=config, backend=backend, parallelism=parallelism, optimizer=optimizer)
    job.trainer = dataclasses.replace(job.trainer, ttt_chunk_slots=512)
    dims = mesh(parallelism)
    target = get_class(backend._target_)(folder / shape, aux_layers=None)
    objective = Eagle3Objective(target, config, seed=0, tau_steps=1, chunk_slots=512, context=context_group(dims))
    draft_shape = Eagle3Draft.shape_for(config, target.config, target.aux_layers, 200)
    module = shard_draft(TTTModule(Eagle3Draft(draft_shape).attach(target), objective), dims, torch.float32)
    optimizers, average = build_optimizers(optimizer, module), WeightAverage(module, optimizer.ema_decay)
    batch = batch_of(tokens, answered=answered)
    schedule = objective.schedule(batch)

    def step():
        start_unshard(module)
        supervision = target.compute_hidden_states(schedule.batch)
        module(schedule, supervision, schedule.counts).loss.backward()
        optimizers.step()
        optimizers.zero_grad()

    release = getattr(target, "release", lambda: None)  # what is gathered would count twice
    step()
    release()
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    stored = (*target.model.parameters(), *module.parameters(), *states, *average.state_dict().values())
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in stored]
    # Of several steps the least: a thread of gloo's now and then frees its buffers only after the next are made.
    peak = min((release(), peak_of_tensors(step))[1] for _ in range(3))
    measured = sum(part.numel() * part.element_size() for part in parts) + peak
    models = estimate.size_models(job, target.config, draft_shape)
    (counted,) = estimate.count(job, target.config, draft_shape, [batch], CPU, 2)
    parts = estimate.peak_memory(job, models, counted, dist.get_world_size(), "cpu", accumulates=False)
    return sum(parts.values()), float(measured)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for name, shape in SHAPES.items():
        make_target(folder / name, num_layers=7, max_position_embeddings=4096, **shape)
    return on_ranks(2, peaks, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_estimated_bytes_are_those_of_the_rank_with_the_most(two_ranks, name):
    """Where ranks share rows that is the first: it has the end of a row, whose slots see the most keys."""
    (estimated_bytes, first), (same, second) = (rank[name] for rank in two_ranks)
    assert estimated_bytes == same == pytest.approx(max(first, second), rel=0.05)


def test_a_piece_of_a_batch_is_a_batch():
    batch = batch_of(700, 500, 848, rows=3)
    assert piece_of(batch, 1.5).num_tokens == batch.num_tokens == 6144
    assert piece_of(batch, 0.01).num_tokens == estimate.SHORTEST_PIECE
    piece = piece_of(batch, 0.2)
    assert piece.document_lengths() == [700, 500, 28]
    assert float(piece.loss_mask.float().mean()) == pytest.approx(0.6, abs=0.02)
    for span in piece.spans:
        place = piece.positions[0, span.start : span.end]
        assert torch.equal(place, torch.arange(span.end - span.start))
