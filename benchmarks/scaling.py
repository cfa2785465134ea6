"""What a training step should take on many GPUs, by arithmetic: nothing is measured, and no GPU is needed.

python -m benchmarks.scaling [--target 8b,70b] [--gpus 1,8,64,512] [--long 32768,131072] [--sharing 1,2,4,8] …

FLOPs and bytes of a step of EAGLE-3 on Llama-3.1 of 8 or 70 billion parameters are counted by running it without data
(``nemo_speculative.training.estimate``, as ``plan=true`` does; the forward of a tensor-parallel rank as if it were of
whole layers).  How fast a GPU and its links are is assumed, and can be given.

A collective over n ranks is a ring: every rank sends (n - 1) / n of the bytes, twice for an all-reduce, in n - 1 hops.
Its bandwidth is that of a GPU's own link inside a node; over nodes, that of the network cards of all GPUs of a node
that belong to the ring.  A step is the target's part, meanwhile the draft's weights are gathered; the draft's part;
then its gradients are reduced and the optimizer steps.  The number of rows on a GPU stays, whatever the number of GPUs.

Where GPUs share long rows (``parallelism=cp``), a GPU has as many tokens in a step whatever their number: parts of more
rows.  What their attention gathers is waited for, on top of all else.
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

from nemo_speculative.algorithms.common.draft import DraftShape
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
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.packing import collate
from nemo_speculative.training import estimate
from nemo_speculative.training.checks import draft_shape

BFLOAT16, FLOAT32 = 2, 4
ADAMW_BYTES = 7 * FLOAT32
"""Read of an entry in a step: weight, gradient and two moments; written: weight and moments."""
SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Of Llama-3.1, as its config.json has them."""


@dataclass(frozen=True)
class Assumed:
    """Of one GPU, its links and the training; every one can be given."""

    flops: float = field(default=4e14, metadata={"what": "FLOP/s in bf16 that the products reach (H200: 40 % of peak)"})
    hbm: float = field(default=4e12, metadata={"what": "bytes/s of a GPU's memory"})
    nvlink: float = field(default=3.5e11, metadata={"what": "bytes/s that a ring gets inside a node"})
    nic: float = field(default=4.5e10, metadata={"what": "bytes/s of a GPU's own network card (400 Gb/s InfiniBand)"})
    storage: float = field(default=2e9, metadata={"what": "bytes/s at which a GPU's share of features is read"})
    hop: float = field(default=5e-6, metadata={"what": "seconds of a hop inside a node"})
    far_hop: float = field(default=1e-5, metadata={"what": "seconds of a hop between nodes"})
    memory: float = field(default=141e9, metadata={"what": "bytes of a GPU's memory (H200)"})
    node: int = field(default=8, metadata={"what": "GPUs of a node"})
    rows: int = field(default=4, metadata={"what": "rows of a GPU in a step, one after the other"})
    row_tokens: int = field(default=4096, metadata={"what": "tokens of a row: four documents, half of each trained"})
    long_documents: int = field(default=1, metadata={"what": "documents of a long row, half of each trained"})
    masked: float = field(
        default=0.5, metadata={"what": "of flops, what the target's attention reaches in parts of documents, by masks"}
    )


@dataclass(frozen=True)
class Ring:
    """Ranks of a collective, of which so many are in each node."""

    ranks: int
    in_node: int

    @classmethod
    def neighbours(cls, ranks: int, a: Assumed) -> "Ring":
        """Ranks next to each other."""
        return cls(ranks, min(ranks, a.node))

    def gather(self, size: float, a: Assumed) -> float:
        """Seconds to gather, or to reduce and scatter, ``size`` bytes over all ranks."""
        inside = self.ranks <= self.in_node
        bandwidth = a.nvlink if inside else min(a.nvlink, self.in_node * a.nic)
        hops = self.ranks - 1
        return hops / self.ranks * size / bandwidth + hops * (a.hop if inside else a.far_hop)

    def all_reduce(self, size: float, a: Assumed) -> float:
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
        """The target's weights without embedding and head."""
        return BFLOAT16 * (self.models.target - self.models.embedding_and_head)

    @property
    def end_bytes(self) -> float:
        """The target's embedding, or its head."""
        return BFLOAT16 * self.models.table

    @property
    def states_bytes(self) -> float:
        """Aux and last hidden states of all rows."""
        return self.rows * self.batch.states_bytes


@dataclass(frozen=True)
class Exchange:
    """Of the keys and values of a row, among the GPUs that share it (context parallelism)."""

    layers: int
    """Each in a collective of its own."""
    size: float
    """Bytes of all GPUs together, of a layer."""

    def seconds(self, sharing: int, a: Assumed) -> float:
        return self.layers * Ring.neighbours(sharing, a).gather(self.size, a)

    def sent(self, sharing: int) -> float:
        """Bytes that leave each GPU."""
        return (sharing - 1) / sharing * self.layers * self.size


@dataclass(frozen=True)
class Exchanges:
    """Of one row: once in every layer, whatever the number of an unroll's steps and parts."""

    target: Exchange
    """In its forward pass."""
    draft: Exchange
    """In its pass over all positions; later steps have keys of their own, which nobody else sees."""
    gradients: Exchange
    """Of the draft's, summed by their owners in float32."""

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
    """Where the target's layers are."""

    name: str
    config: BackendConfig

    @abstractmethod
    def share(self, gpus: int, a: Assumed) -> float:
        """Of the layers, what each GPU holds."""

    @abstractmethod
    def seconds(self, work: Work, gpus: int, a: Assumed) -> float:
        """Of the target's part of a step."""

    def beside(self, work: Work, a: Assumed) -> float:
        """Seconds of what goes on all through a step beside it."""
        return 0.0


class Replicated(Target):
    name = "hf"
    config = HFBackendConfig()

    def share(self, gpus: int, a: Assumed) -> float:
        return 1.0

    def seconds(self, work: Work, gpus: int, a: Assumed) -> float:
        return work.target / a.flops


class Sharded(Target):
    """By FSDP2 over all GPUs: the layers are gathered for every row, each while the one before computes."""

    name = "hf_fsdp2"
    config = ShardedHFBackendConfig()

    def share(self, gpus: int, a: Assumed) -> float:
        return 1 / gpus

    def seconds(self, work: Work, gpus: int, a: Assumed) -> float:
        layers = work.models.num_layers
        ring = Ring.neighbours(gpus, a)
        layer = ring.gather(work.layers_bytes / layers, a)
        return max(work.target / a.flops, work.rows * layers * layer) + _ends(work, ring, a)


class TensorParallel(Target):
    """Each layer over a node, for the rows of all its ranks in turn; two sums of activations a layer, waited for."""

    name = "hf_tp"
    config = TensorParallelHFBackendConfig()

    def share(self, gpus: int, a: Assumed) -> float:
        return 1 / min(gpus, a.node)

    def seconds(self, work: Work, gpus: int, a: Assumed) -> float:
        ranks = min(gpus, a.node)
        hidden = work.training.config.hidden_size
        activations, ring = BFLOAT16 * ranks * work.batch.tokens * hidden, Ring.neighbours(ranks, a)
        sums = 2 * work.models.num_layers * ring.all_reduce(activations, a)
        return work.target / a.flops + work.rows * sums + _ends(work, ring, a)


def _ends(work: Work, ring: Ring, a: Assumed) -> float:
    """Seconds for which every row waits: its tokens are embedded for the target and for the draft, the loss has the
    head."""
    return work.rows * 3 * ring.gather(work.end_bytes, a)


class Elsewhere(Target):
    """The states come from somewhere: the layers are not here."""

    def __init__(self, name: str, config: BackendConfig, bandwidth: Callable[[Assumed], float]):
        self.name, self.config, self._bandwidth = name, config, bandwidth

    def share(self, gpus: int, a: Assumed) -> float:
        return 0.0

    def seconds(self, work: Work, gpus: int, a: Assumed) -> float:
        return 0.0

    def beside(self, work: Work, a: Assumed) -> float:
        return work.states_bytes / self._bandwidth(a)


@dataclass(frozen=True)
class Draft:
    """How the draft is spread."""

    name: str
    shards: Callable[[int, Assumed], int]
    """Of so many GPUs, how many share one."""

    def gather(self, parameters: int, gpus: int, a: Assumed) -> float:
        """Seconds to put the weights to compute with together, in bfloat16."""
        return Ring.neighbours(self.shards(gpus, a), a).gather(BFLOAT16 * parameters, a)

    def reduce(self, parameters: int, gpus: int, a: Assumed) -> float:
        """Seconds to sum the float32 gradients over all ranks: scattered to the shards, and over their replicas."""
        shards = self.shards(gpus, a)
        replicas = Ring(gpus // shards, max(1, min(gpus, a.node) // shards))
        scattered = Ring.neighbours(shards, a).gather(FLOAT32 * parameters, a)
        return scattered + replicas.all_reduce(FLOAT32 * parameters / shards, a)


DDP = Draft("ddp", lambda gpus, a: 1)
FSDP2 = Draft("fsdp2", lambda gpus, a: gpus)
HSDP = Draft("hsdp", lambda gpus, a: min(gpus, a.node))
SERVED = Elsewhere("remote", RemoteBackendConfig(urls=["http://127.0.0.1:31000"]), lambda a: a.nic)
CACHED = Elsewhere("features", FeaturesBackendConfig(), lambda a: a.storage)
WAYS: dict[str, list[tuple[Draft, Target]]] = {
    "8b": [(DDP, Replicated()), (FSDP2, Replicated()), (HSDP, Replicated()), (HSDP, SERVED), (HSDP, CACHED)],
    "70b": [
        (HSDP, Replicated()), (HSDP, Sharded()), (HSDP, TensorParallel()), (FSDP2, TensorParallel()), (HSDP, SERVED),
        (HSDP, CACHED),
    ],
}  # fmt: skip

LONG: dict[str, Target] = {"8b": Replicated(), "70b": Sharded()}
"""Targets that compute a share of a row."""


@dataclass(frozen=True)
class Step:
    """Of one way on so many GPUs."""

    seconds: float
    computing: float
    """Of the seconds, those of products: the share is the efficiency."""
    bytes: float
    """Of a GPU's memory."""


def step(work: Work, draft: Draft, target: Target, gpus: int, a: Assumed) -> Step:
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
    seconds = max(before + work.draft / a.flops + after, target.beside(work, a))
    return Step(seconds, computing, sum(memory.values()))


@dataclass(frozen=True)
class Shared:
    """Seconds of a step whose rows several GPUs share, and what of them is what."""

    step: Step
    target: float
    exchanges: float
    """Of keys, values and their gradients."""
    draft: float


def shared(work: Work, target: Target, sharing: int, gpus: int, a: Assumed) -> Shared:
    """Of ``gpus``, among which the draft is sharded, and of which ``sharing`` neighbours each share a row."""
    alone = step(work, FSDP2, target, gpus, a)
    exchanges = work.rows * sum(one.seconds(sharing, a) for one in Exchanges.of(work).all)
    slower = work.target_attention / a.flops * (1 / a.masked - 1) if sharing > 1 else 0.0
    found = replace(alone, seconds=alone.seconds + exchanges + slower)
    return Shared(found, target.seconds(work, gpus, a) + slower, exchanges, work.draft / a.flops)


@dataclass(frozen=True)
class Training:
    """Of EAGLE-3 on a target of that shape, as conf/ has them."""

    job: TrainJob
    config: Any
    """Of the target, from transformers."""
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
        """The work of ``rows`` like ``row``, one after the other, on the first of the GPUs that share them.

        It has the end of the row, whose slots see the most keys, so the others wait for it.
        """
        job = replace(self.job, parallelism=replace(self.job.parallelism, context=sharing))
        (counted,) = estimate.count(job, self.config, self.shape, [row], torch.device("cuda"))
        return Work(self, counted, row.num_tokens, rows)


def one_row(tokens: int, documents: int) -> Batch:
    """Of documents that are each a prompt and an answer, all of equal lengths."""
    half = tokens // (2 * documents)
    packed = [TokenRow(str(i), [1] * 2 * half, [False] * half + [True] * half, "") for i in range(documents)]
    return collate([packed], tokens, pad_id=0)


def table(size: str, training: Training, gpus: Sequence[int], a: Assumed) -> list[str]:
    """Lines of markdown."""
    work = training.work(one_row(a.row_tokens, 4), a.rows)
    tera = f"{work.target / 1e12:.0f} TFLOP of the target and {work.draft / 1e12:.0f} of the draft a GPU and step"
    lines = [
        f"Llama-3.1-{size.upper()}, EAGLE-3, {work.models.draft_parameters / 1e6:.0f} M parameters: {tera}.",
        "",
        "| `parallelism=` | `backend=` | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in gpus) + " |",
        "|---|---|" + "---|" * len(gpus),
    ]
    for draft, target in WAYS[size]:
        cells = [_cell(step(work, draft, target, n, a), a) for n in gpus]
        lines.append(f"| {draft.name} | {target.name} | {' | '.join(cells)} |")
    return lines


def long_table(size: str, training: Training, lengths: Sequence[int], counts: Sequence[int], a: Assumed) -> list[str]:
    """Of rows of so many tokens, each shared by one of ``counts`` GPUs; lines of markdown."""
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
            found = shared(work, target, sharing, gpus, a)
            lines.append(f"| {tokens} | {sharing} | {' | '.join(_long_cells(found, work, sharing, a))} |")
    return lines


def _long_cells(found: Shared, work: Work, sharing: int, a: Assumed) -> list[str]:
    sent = work.rows * sum(one.sent(sharing) for one in Exchanges.of(work).all)
    seconds, size = found.step.seconds, found.step.bytes
    return [
        f"{found.target:.2f} s",
        f"{found.draft:.2f} s",
        f"{found.exchanges:.2f} s, {sent / 1e9:.0f} GB",
        f"{seconds:.2f} s",
        f"{work.rows * work.row_tokens / sharing / seconds:.0f}",
        f"{'does not fit: ' if size > a.memory else ''}{size / 1e9:.0f} GB",
    ]


def _cell(found: Step, a: Assumed) -> str:
    if found.bytes > a.memory:
        return f"does not fit: {found.bytes / 1e9:.0f} GB"
    share = found.computing / found.seconds
    return f"{found.seconds * 1e3:.0f} ms, {share:.0%}, {found.bytes / 1e9:.0f} GB"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="8b,70b", help="of %(default)s")
    parser.add_argument("--gpus", default="1,8,64,512", help="how many; %(default)s")
    parser.add_argument("--long", default="32768,131072", help="tokens of the rows that GPUs share; %(default)s")
    parser.add_argument("--sharing", default="1,2,4,8", help="how many of them share a row; %(default)s")
    for one in fields(Assumed):
        option = f"--{one.name.replace('_', '-')}"
        parser.add_argument(option, type=type(one.default), default=one.default, help=one.metadata["what"])
    given = parser.parse_args(arguments)
    a = Assumed(**{one.name: getattr(given, one.name) for one in fields(Assumed)})
    for one in fields(Assumed):
        print(f"assumed: {one.name} = {getattr(a, one.name):g}, {one.metadata['what']}")
    for size in given.target.split(","):
        if size not in SIZES:
            sys.exit(f"error: --target {size}: expected one of {', '.join(SIZES)}")
        training = Training.of(size)
        print("", *table(size, training, _numbers(given.gpus), a), sep="\n")
        print("", *long_table(size, training, _numbers(given.long), _numbers(given.sharing), a), sep="\n")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
