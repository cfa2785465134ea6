"""Estimate of the time and memory of a training step on many GPUs: nothing is measured, and no GPU is needed.

python -m benchmarks.scaling [--target 8b,70b] [--gpus 1,8,64,512] [--long 32768,131072] [--sharing 1,2,4,8] …

FLOPs and bytes of a step of EAGLE-3 on Llama-3.1 of 8 or 70 billion parameters are counted by running it without data
(``nemo_speculative.training.estimate``, as ``plan=true`` does; a tensor-parallel rank is counted as if its layers were
whole).  The speeds of a GPU and its links are assumptions, which options change.

A collective over n ranks is a ring: every rank sends (n - 1) / n of the bytes, twice for an all-reduce, in n - 1 hops.
Inside a node its bandwidth is that of a GPU's link; between nodes, that of the network cards of all GPUs of a node that
belong to the ring.  A step consists of the target's part, during which the draft's weights are gathered; the draft's
part; and the reduction of its gradients with the optimizer's step.  Each GPU has the same number of rows, whatever the
number of GPUs.

Where GPUs share long rows (``parallelism=cp``), each GPU has the same number of tokens in a step, whatever their
number, as parts of more rows.  The time in which their attention gathers keys and values is added to the rest.
"""

import argparse
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig

from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.config.schema import (
    BackendConfig,
    FeaturesBackendConfig,
    HFBackendConfig,
    ParallelismConfig,
    RemoteBackendConfig,
    ShardedHFBackendConfig,
    TensorParallelHFBackendConfig,
    TrainJob,
)
from nemo_speculative.data.batch import Batch, collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.training import estimate
from nemo_speculative.training.checks import draft_shape

BFLOAT16, FLOAT32 = 2, 4
ADAMW_BYTES = 7 * FLOAT32
"""Bytes per parameter that a step reads (weight, gradient and two moments) and writes (weight and moments)."""
SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Shapes of Llama-3.1, from its config.json."""


@dataclass(frozen=True)
class Assumptions:
    """Speeds and sizes of a GPU, its links and the training; each is an option of the command line."""

    flops: float = field(default=4e14, metadata={"help": "FLOP/s of matrix products in bf16 (H200: 40 % of its peak)"})
    hbm: float = field(default=4e12, metadata={"help": "bytes/s of a GPU's memory"})
    nvlink: float = field(default=3.5e11, metadata={"help": "bytes/s of a ring inside a node"})
    nic: float = field(default=4.5e10, metadata={"help": "bytes/s of a GPU's own network card (400 Gb/s InfiniBand)"})
    storage: float = field(default=2e9, metadata={"help": "bytes/s at which a GPU's share of features is read"})
    hop: float = field(default=5e-6, metadata={"help": "seconds of a hop inside a node"})
    far_hop: float = field(default=1e-5, metadata={"help": "seconds of a hop between nodes"})
    memory: float = field(default=141e9, metadata={"help": "bytes of a GPU's memory (H200)"})
    node: int = field(default=8, metadata={"help": "GPUs of a node"})
    rows: int = field(default=4, metadata={"help": "rows of a GPU in a step, one after the other"})
    row_tokens: int = field(default=4096, metadata={"help": "tokens of a row: four documents, half of each supervised"})
    long_documents: int = field(default=1, metadata={"help": "documents of a long row, half of each supervised"})
    masked: float = field(
        default=0.5, metadata={"help": "share of flops that the target's attention reaches with a mask (shared rows)"}
    )


@dataclass(frozen=True)
class Ring:
    """Ranks of a collective, ``in_node`` of them in each node."""

    ranks: int
    in_node: int

    @classmethod
    def of_consecutive(cls, ranks: int, a: Assumptions) -> "Ring":
        """A ring of consecutive ranks, which fill one node after the other."""
        return cls(ranks, min(ranks, a.node))

    def gather(self, size: float, a: Assumptions) -> float:
        """Seconds to gather, or to reduce and scatter, ``size`` bytes over all ranks."""
        inside = self.ranks <= self.in_node
        bandwidth = a.nvlink if inside else min(a.nvlink, self.in_node * a.nic)
        hops = self.ranks - 1
        return hops / self.ranks * size / bandwidth + hops * (a.hop if inside else a.far_hop)

    def all_reduce(self, size: float, a: Assumptions) -> float:
        return 2 * self.gather(size, a)


@dataclass(frozen=True)
class Work:
    """The work of one GPU in one step."""

    training: "Training"
    batch: estimate.MicroBatch
    """One row, or this GPU's part of it."""
    row_tokens: int
    """Tokens of the row as a whole."""
    rows: int

    @property
    def models(self) -> estimate.Models:
        return self.training.models

    @property
    def target(self) -> float:
        """FLOPs of the target's layers."""
        return self.rows * self.batch.target_flops

    @property
    def target_attention(self) -> float:
        """FLOPs of their attention alone."""
        return self.rows * self.batch.flops["target attention"]

    @property
    def draft(self) -> float:
        """FLOPs of the draft, forward and backward, and of the labels from the target's head."""
        return self.rows * self.batch.draft_flops

    @property
    def layers_bytes(self) -> float:
        """Bytes of the target's weights without embedding and head."""
        return BFLOAT16 * (self.models.target - self.models.embedding_and_head)

    @property
    def table_bytes(self) -> float:
        """Bytes of the target's embedding, or of its head."""
        return BFLOAT16 * self.models.table

    @property
    def states_bytes(self) -> float:
        """Bytes of the aux and last hidden states of all rows."""
        return self.rows * self.batch.states_bytes


@dataclass(frozen=True)
class Exchange:
    """Keys and values that the GPUs that share a row exchange (context parallelism)."""

    layers: int
    """Number of layers, each with a collective of its own."""
    size: float
    """Bytes of a layer's keys and values, of all GPUs together."""

    def seconds(self, sharing: int, a: Assumptions) -> float:
        return self.layers * Ring.of_consecutive(sharing, a).gather(self.size, a)

    def sent(self, sharing: int) -> float:
        """Bytes that each GPU sends."""
        return (sharing - 1) / sharing * self.layers * self.size


@dataclass(frozen=True)
class Exchanges:
    """The exchanges of one row: once per layer, whatever the number of steps and chunks of an unroll."""

    target: Exchange
    """In the target's forward."""
    draft: Exchange
    """In the draft's step 0, over all positions; keys of later steps are read only by their own slot."""
    gradients: Exchange
    """Gradients of the draft's keys and values, which the rank that owns them sums in float32."""

    @classmethod
    def of(cls, work: Work) -> "Exchanges":
        target, draft = work.training.config, work.training.shape
        head_dim = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
        widths = target.num_key_value_heads * head_dim, draft.num_kv_heads * draft.head_dim
        of_target, of_draft = (2 * work.row_tokens * width for width in widths)
        return cls(
            Exchange(target.num_hidden_layers, BFLOAT16 * of_target),
            Exchange(draft.num_layers, BFLOAT16 * of_draft),
            Exchange(draft.num_layers, FLOAT32 * of_draft),
        )

    @property
    def all(self) -> Sequence[Exchange]:
        return self.target, self.draft, self.gradients


class Target(ABC):
    """A placement of the target's layers."""

    name: str
    config: BackendConfig

    @abstractmethod
    def share(self, gpus: int, a: Assumptions) -> float:
        """Share of the layers on each GPU."""

    @abstractmethod
    def seconds(self, work: Work, gpus: int, a: Assumptions) -> float:
        """Seconds of the target's part of a step."""

    def loading_seconds(self, work: Work, a: Assumptions) -> float:
        """Seconds in which hidden states arrive, at the same time as the rest of the step runs."""
        return 0.0


class Replicated(Target):
    """Whole on every GPU."""

    name = "hf"
    config = HFBackendConfig()

    def share(self, gpus: int, a: Assumptions) -> float:
        return 1.0

    def seconds(self, work: Work, gpus: int, a: Assumptions) -> float:
        return work.target / a.flops


class Sharded(Target):
    """Sharded by FSDP2 over all GPUs: for every row each layer is gathered while the previous one computes."""

    name = "hf_fsdp2"
    config = ShardedHFBackendConfig()

    def share(self, gpus: int, a: Assumptions) -> float:
        return 1 / gpus

    def seconds(self, work: Work, gpus: int, a: Assumptions) -> float:
        layers = work.models.num_layers
        ring = Ring.of_consecutive(gpus, a)
        layer = ring.gather(work.layers_bytes / layers, a)
        return max(work.target / a.flops, work.rows * layers * layer) + _table_seconds(work, ring, a)


class TensorParallel(Target):
    """Each layer split over a node, which computes the rows of all its ranks in turn.

    Every layer waits for two all-reduces of activations.
    """

    name = "hf_tp"
    config = TensorParallelHFBackendConfig()

    def share(self, gpus: int, a: Assumptions) -> float:
        return 1 / min(gpus, a.node)

    def seconds(self, work: Work, gpus: int, a: Assumptions) -> float:
        ranks = min(gpus, a.node)
        hidden = work.training.config.hidden_size
        activations, ring = BFLOAT16 * ranks * work.batch.tokens * hidden, Ring.of_consecutive(ranks, a)
        sums = 2 * work.models.num_layers * ring.all_reduce(activations, a)
        return work.target / a.flops + work.rows * sums + _table_seconds(work, ring, a)


def _table_seconds(work: Work, ring: Ring, a: Assumptions) -> float:
    """Seconds to gather, for every row, the embedding twice (for target and draft) and the head (for the loss)."""
    return work.rows * 3 * ring.gather(work.table_bytes, a)


class Received(Target):
    """No layers on the GPUs: the hidden states arrive over the network or from storage."""

    def __init__(self, name: str, config: BackendConfig, bandwidth: Callable[[Assumptions], float]):
        self.name, self.config, self._bandwidth = name, config, bandwidth

    def share(self, gpus: int, a: Assumptions) -> float:
        return 0.0

    def seconds(self, work: Work, gpus: int, a: Assumptions) -> float:
        return 0.0

    def loading_seconds(self, work: Work, a: Assumptions) -> float:
        return work.states_bytes / self._bandwidth(a)


@dataclass(frozen=True)
class Draft:
    """A way to distribute the draft over GPUs."""

    name: str
    shards: Callable[[int, Assumptions], int]
    """Number of shards of the draft on a number of GPUs."""

    def gather(self, parameters: int, gpus: int, a: Assumptions) -> float:
        """Seconds to gather the weights, in bfloat16."""
        return Ring.of_consecutive(self.shards(gpus, a), a).gather(BFLOAT16 * parameters, a)

    def reduce(self, parameters: int, gpus: int, a: Assumptions) -> float:
        """Seconds to sum the float32 gradients over all ranks: reduce-scatter to shards, all-reduce of replicas."""
        shards = self.shards(gpus, a)
        replicas = Ring(gpus // shards, max(1, min(gpus, a.node) // shards))
        scattered = Ring.of_consecutive(shards, a).gather(FLOAT32 * parameters, a)
        return scattered + replicas.all_reduce(FLOAT32 * parameters / shards, a)


DDP = Draft("ddp", lambda gpus, a: 1)
FSDP2 = Draft("fsdp2", lambda gpus, a: gpus)
HSDP = Draft("hsdp", lambda gpus, a: min(gpus, a.node))
SERVED = Received("remote", RemoteBackendConfig(urls=["http://127.0.0.1:31000"]), lambda a: a.nic)
CACHED = Received("features", FeaturesBackendConfig(), lambda a: a.storage)
LAYOUTS: dict[str, list[tuple[Draft, Target]]] = {
    "8b": [(DDP, Replicated()), (FSDP2, Replicated()), (HSDP, Replicated()), (HSDP, SERVED), (HSDP, CACHED)],
    "70b": [
        (HSDP, Replicated()), (HSDP, Sharded()), (HSDP, TensorParallel()), (FSDP2, TensorParallel()), (HSDP, SERVED),
        (HSDP, CACHED),
    ],
}  # fmt: skip

LONG: dict[str, Target] = {"8b": Replicated(), "70b": Sharded()}
"""Targets of the tables of long rows, which compute a GPU's part of a row."""


@dataclass(frozen=True)
class Step:
    """Time and memory of a step."""

    seconds: float
    computing: float
    """Seconds of matrix products; their share of ``seconds`` is the efficiency."""
    bytes: float
    """Peak memory of a GPU."""


def step(work: Work, draft: Draft, target: Target, gpus: int, a: Assumptions) -> Step:
    """Time and memory of a step of ``work`` on each of ``gpus`` GPUs."""
    parameters, shards = work.models.draft_parameters, draft.shards(gpus, a)
    before = max(target.seconds(work, gpus, a), draft.gather(parameters, gpus, a))
    update = ADAMW_BYTES * parameters / shards / a.hbm
    after = draft.reduce(parameters, gpus, a) + update
    backend = target.config
    if isinstance(backend, TensorParallelHFBackendConfig):
        backend = replace(backend, tp_size=min(gpus, a.node))
    job = replace(work.training.job, backend=backend, parallelism=ParallelismConfig(replicate=-1, shard=shards))
    memory = estimate.peak_memory(job, work.models, work.batch, gpus, "cuda", accumulates=work.rows > 1)
    computing = work.draft / a.flops + (work.target / a.flops if target.share(gpus, a) else 0.0)
    seconds = max(before + work.draft / a.flops + after, target.loading_seconds(work, a))
    return Step(seconds, computing, sum(memory.values()))


@dataclass(frozen=True)
class Shared:
    """A step whose rows are shared by several GPUs, and the seconds of its parts."""

    step: Step
    target: float
    exchanges: float
    """Seconds to exchange keys, values and their gradients."""
    draft: float


def shared(work: Work, target: Target, sharing: int, gpus: int, a: Assumptions) -> Shared:
    """The step on ``gpus`` GPUs that shard the draft; each row is shared by ``sharing`` consecutive ones."""
    unshared = step(work, FSDP2, target, gpus, a)
    exchanges = work.rows * sum(exchange.seconds(sharing, a) for exchange in Exchanges.of(work).all)
    masks = work.target_attention / a.flops * (1 / a.masked - 1) if sharing > 1 else 0.0
    total = replace(unshared, seconds=unshared.seconds + exchanges + masks)
    return Shared(total, target.seconds(work, gpus, a) + masks, exchanges, work.draft / a.flops)


@dataclass(frozen=True)
class Training:
    """EAGLE-3 for a target of one size, with the settings of conf/."""

    job: TrainJob
    config: Any
    """The target's configuration (transformers)."""
    shape: DraftShape
    models: estimate.Models

    @classmethod
    def of(cls, size: str) -> "Training":
        with initialize_config_dir(str(CONF), version_base="1.3"):
            job = to_job(compose("train_eagle3", ["experiment=llama31_8b_ultrachat", "output_dir=unused"]))
        shared = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        config = LlamaConfig(tie_word_embeddings=False, **shared, **SIZES[size])
        shape = draft_shape(job, config, job.draft.vocabulary(config.vocab_size).entries or config.vocab_size)
        return cls(job, config, shape, estimate.size_models(job, config, shape))

    def work(self, row: Batch, rows: int, sharing: int = 1) -> Work:
        """The work of ``rows`` rows like ``row``, one after the other, on the first of the GPUs that share them.

        The first GPU has the end of the row, whose slots read the most keys, so the others wait for it.
        """
        job = replace(self.job, parallelism=replace(self.job.parallelism, context=sharing))
        (counted,) = estimate.count(job, self.config, self.shape, [row], torch.device("cuda"))
        return Work(self, counted, row.num_tokens, rows)


def one_row(tokens: int, documents: int) -> Batch:
    """A row of documents of equal lengths, each a prompt and an answer as long."""
    half = tokens // (2 * documents)
    packed = [TokenRow(str(i), [1] * 2 * half, [False] * half + [True] * half, "") for i in range(documents)]
    return collate([packed], tokens, pad_id=0)


def table(size: str, training: Training, gpus: Sequence[int], a: Assumptions) -> list[str]:
    """Markdown table of a step on different numbers of GPUs, as lines."""
    work = training.work(one_row(a.row_tokens, 4), a.rows)
    tera = f"{work.target / 1e12:.0f} TFLOP of the target and {work.draft / 1e12:.0f} of the draft per GPU and step"
    lines = [
        f"Llama-3.1-{size.upper()}, EAGLE-3, {work.models.draft_parameters / 1e6:.0f} M parameters: {tera}.",
        "",
        "| `parallelism=` | `backend=` | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in gpus) + " |",
        "|---|---|" + "---|" * len(gpus),
    ]
    for draft, target in LAYOUTS[size]:
        cells = [_cell(step(work, draft, target, n, a), a) for n in gpus]
        lines.append(f"| {draft.name} | {target.name} | {' | '.join(cells)} |")
    return lines


def long_table(
    size: str, training: Training, lengths: Sequence[int], counts: Sequence[int], a: Assumptions
) -> list[str]:
    """Markdown table of rows of each of ``lengths`` tokens, shared by each of ``counts`` GPUs, as lines."""
    gpus, target = math.lcm(a.node, *counts), LONG[size]
    lines = [
        f"Llama-3.1-{size.upper()}, EAGLE-3, `backend={target.name}`: {gpus * a.rows} rows a step, {gpus} GPUs.",
        "",
        "| tokens of a row | GPUs that share it | target | draft | keys and values | step | tokens/s a GPU | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens in lengths:
        row = one_row(tokens, a.long_documents)
        for sharing in counts:
            work = training.work(row, a.rows * sharing, sharing)
            result = shared(work, target, sharing, gpus, a)
            lines.append(f"| {tokens} | {sharing} | {' | '.join(_long_cells(result, work, sharing, a))} |")
    return lines


def _long_cells(result: Shared, work: Work, sharing: int, a: Assumptions) -> list[str]:
    sent = work.rows * sum(exchange.sent(sharing) for exchange in Exchanges.of(work).all)
    seconds, size = result.step.seconds, result.step.bytes
    return [
        f"{result.target:.2f} s",
        f"{result.draft:.2f} s",
        f"{result.exchanges:.2f} s, {sent / 1e9:.0f} GB",
        f"{seconds:.2f} s",
        f"{work.rows * work.row_tokens / sharing / seconds:.0f}",
        f"{'does not fit: ' if size > a.memory else ''}{size / 1e9:.0f} GB",
    ]


def _cell(result: Step, a: Assumptions) -> str:
    if result.bytes > a.memory:
        return f"does not fit: {result.bytes / 1e9:.0f} GB"
    share = result.computing / result.seconds
    return f"{result.seconds * 1e3:.0f} ms, {share:.0%}, {result.bytes / 1e9:.0f} GB"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="8b,70b", help="sizes of the target (default: %(default)s)")
    parser.add_argument("--gpus", default="1,8,64,512", help="numbers of GPUs (default: %(default)s)")
    parser.add_argument("--long", default="32768,131072", help="tokens of shared rows (default: %(default)s)")
    parser.add_argument("--sharing", default="1,2,4,8", help="numbers of GPUs that share a row (default: %(default)s)")
    for assumption in fields(Assumptions):
        option, default = f"--{assumption.name.replace('_', '-')}", assumption.default
        parser.add_argument(option, type=type(default), default=default, help=assumption.metadata["help"])
    options = parser.parse_args(arguments)
    a = Assumptions(**{assumption.name: getattr(options, assumption.name) for assumption in fields(Assumptions)})
    for assumption in fields(Assumptions):
        print(f"assumed: {assumption.name} = {getattr(a, assumption.name):g}, {assumption.metadata['help']}")
    for size in options.target.split(","):
        if size not in SIZES:
            sys.exit(f"error: --target {size}: expected one of {', '.join(SIZES)}")
        training = Training.of(size)
        print("", *table(size, training, _numbers(options.gpus), a), sep="\n")
        print("", *long_table(size, training, _numbers(options.long), _numbers(options.sharing), a), sep="\n")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
