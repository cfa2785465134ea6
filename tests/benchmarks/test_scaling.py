"""The arithmetic of ``benchmarks.scaling``, by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hydra.utils import get_class
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scaling import (
    CACHED,
    DDP,
    FSDP2,
    HSDP,
    SERVED,
    Assumptions,
    Exchange,
    Exchanges,
    Replicated,
    Ring,
    Sharded,
    TensorParallel,
    Training,
    Work,
    main,
    one_row,
    shared,
    step,
)
from nemo_speculative.config.schema import Eagle3DraftConfig, ParallelismConfig, ShardedHFBackendConfig, TrainJob
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.distributed import context_parallel, parallelism, titan
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.trainer import TTTModule
from tests.conftest import make_tokenizer
from tests.training.ranks import on_ranks

NO_HOPS = {"hop": 0.0, "far_hop": 0.0}
A = Assumptions(nvlink=100.0, nic=10.0, **NO_HOPS)


def sent_by_a_rank_in_a_ring(ranks, size):
    """Bytes sent, simulated chunk by chunk: every rank forwards the chunk it received last, until all have all."""
    chunk, sent = size / ranks, 0.0
    chunks = [{rank} for rank in range(ranks)]
    last = list(range(ranks))
    while any(len(of_rank) < ranks for of_rank in chunks):
        last = [last[rank - 1] for rank in range(ranks)]
        for rank, received in enumerate(last):
            chunks[rank].add(received)
        sent += chunk
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_sends_as_much_as_its_simulation(ranks):
    assert Ring.of_consecutive(ranks, A).gather(4200.0, A) * A.nvlink == pytest.approx(
        sent_by_a_rank_in_a_ring(ranks, 4200)
    )


def test_a_ring_has_the_bandwidth_of_its_narrowest_link():
    assert Ring(8, 8).gather(800.0, A) == pytest.approx(7 / 8 * 800 / 100)  # inside a node
    assert Ring(16, 8).gather(800.0, A) == pytest.approx(15 / 16 * 800 / 80)  # eight cards of 10 each
    assert Ring(16, 1).gather(800.0, A) == pytest.approx(15 / 16 * 800 / 10)  # one of each node
    assert Ring(2, 1).all_reduce(800.0, A) == pytest.approx(2 * 1 / 2 * 800 / 10)


def test_a_ring_waits_for_every_hop():
    a = Assumptions(hop=1.0, far_hop=3.0)
    assert Ring(8, 8).gather(0, a) == 7 and Ring(16, 8).gather(0, a) == 45 and Ring(16, 8).all_reduce(0, a) == 90


@pytest.mark.parametrize(
    ("draft", "gpus", "gathered", "reduced"),
    [
        (DDP, 1, 0, 0),
        (DDP, 8, 0, 2 * 7 / 8 * 4 / 100),
        (DDP, 16, 0, 2 * 15 / 16 * 4 / 80),
        (FSDP2, 8, 7 / 8 * 2 / 100, 7 / 8 * 4 / 100),
        (FSDP2, 64, 63 / 64 * 2 / 80, 63 / 64 * 4 / 80),
        (HSDP, 8, 7 / 8 * 2 / 100, 7 / 8 * 4 / 100),
        # Inside the node, then an eighth of it with the same GPU of seven other nodes, over one card.
        (HSDP, 64, 7 / 8 * 2 / 100, 7 / 8 * 4 / 100 + 2 * 7 / 8 * (4 / 8) / 10),
    ],
)
def test_a_draft_gathers_bfloat16_and_reduces_float32(draft, gpus, gathered, reduced):
    assert draft.gather(1000, gpus, A) == pytest.approx(1000 * gathered)
    assert draft.reduce(1000, gpus, A) == pytest.approx(1000 * reduced)


@pytest.fixture(scope="module")
def work():
    """Work of Llama-3.1-8B on rows of 512 tokens."""
    return Training.of("8b").work(one_row(512, 4), 3)


def test_work_matches_the_published_shape(work):
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    scores = 4 * 128 * 128 / 2 * 4096 * 2  # four documents of 128 tokens; scores and their values
    assert work.target == 2 * 3 * 32 * (512 * layer + scores)
    assert work.layers_bytes == 2 * (32 * (layer + 2 * 4096) + 4096)  # with the norms
    assert work.states_bytes == 3 * 512 * 4 * 4096 * 2


def test_a_step_sums_the_parts_that_do_not_overlap(work):
    slow = Assumptions(rows=3, row_tokens=512, flops=1e12, hbm=1e30, nvlink=1e11, **NO_HOPS)
    parameters = work.models.draft_parameters
    one = step(work, DDP, Replicated(), 1, slow)
    assert one.seconds == pytest.approx((work.target + work.draft) / 1e12) and one.computing == pytest.approx(
        one.seconds
    )
    # The gather overlaps with the target, the reduction does not.
    eight = step(work, FSDP2, Replicated(), 8, slow)
    assert eight.seconds - one.seconds == pytest.approx(7 / 8 * 4 * parameters / 1e11)
    assert eight.computing == one.computing and eight.bytes < one.bytes


def test_a_sharded_target_takes_the_longer_of_gathering_and_computing(work):
    for nvlink in (1e9, 1e15):
        a = Assumptions(flops=1e15, nvlink=nvlink, **NO_HOPS)
        gathering = work.rows * 7 / 8 * work.layers_bytes / nvlink
        # The embedding twice, for target and draft, and the head.
        tables = work.rows * 7 / 8 * 3 * (128256 * 4096 * 2) / nvlink
        assert Sharded().seconds(work, 8, a) == pytest.approx(max(work.target / 1e15, gathering) + tables)
    assert (Sharded().share(512, a), TensorParallel().share(512, a)) == (1 / 512, 1 / 8)


def test_a_tensor_parallel_target_waits_for_two_sums_a_layer(work):
    a = Assumptions(flops=1e15, nvlink=1e11, **NO_HOPS)
    activations = 8 * 512 * 4096 * 2  # the rows of all eight ranks
    sums = 3 * 32 * 2 * (2 * 7 / 8 * activations / 1e11)
    tables = 3 * 3 * 7 / 8 * (128256 * 4096 * 2) / 1e11
    assert TensorParallel().seconds(work, 8, a) == pytest.approx(work.target / 1e15 + sums + tables)


def test_memory_of_sharded_targets_equals_the_plans(work, monkeypatch):

    def bytes_of(target, work=work):
        return step(work, HSDP, target, 8, Assumptions()).bytes

    # When target and draft run in turn, no hidden states of the next micro-batch are in memory.
    ahead = work.states_bytes / work.rows + work.batch.forward_bytes
    saved = 7 / 8 * (work.layers_bytes + 2 * work.table_bytes) - work.table_bytes  # the gathered head is whole
    assert bytes_of(Replicated()) - bytes_of(TensorParallel()) == pytest.approx(saved + ahead)
    # Threads read two micro-batches of features ahead, and request one from a server.
    assert bytes_of(CACHED) - bytes_of(SERVED) == pytest.approx(work.states_bytes / work.rows)
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 31)  # more than a backward leaves free
    some = bytes_of(Sharded())
    # Gathered layers may take the place of gradients, except those of earlier micro-batches.
    assert bytes_of(Sharded(), replace(work, rows=1)) < some
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 32)
    assert bytes_of(Sharded()) - some == pytest.approx(work.layers_bytes / 32)


@pytest.mark.parametrize(("target", "link"), [(SERVED, "nic"), (CACHED, "storage")])
def test_received_states_cost_no_flops_and_bound_a_step_by_their_link(work, target, link):
    bound = step(work, DDP, target, 1, Assumptions(**{link: 1e3}))
    assert bound.seconds == pytest.approx(work.states_bytes / 1e3)
    free = step(work, DDP, target, 1, Assumptions(**{link: 1e30}, hbm=1e30))
    assert free.seconds == pytest.approx(work.draft / Assumptions().flops) == free.computing


TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
SHARED = {
    "EAGLE-3": Eagle3DraftConfig(ttt_steps=4, vocab_size=48, aux_layers=[1, 2, 3]),
    "two layers": Eagle3DraftConfig(ttt_steps=2, vocab_size=48, aux_layers=[1, 2, 3], num_layers=2),
}
MICRO_BATCHES = 2


def tiny_batch():
    """Two rows with enough supervised tokens that every rank has its slots in several chunks."""
    documents = [[TokenRow(name, [3] * n, [t > 10 for t in range(n)], "")] for name, n in (("a", 200), ("b", 170))]
    return collate(documents, 200, pad_id=0)


def tiny_draft(config, target, ranks):
    """Draft and objective."""
    draft_class = get_class(config._target_)
    shape = draft_class.shape_for(config, TINY, [1, 2, 3], 48)
    objective = get_class(config.objective)(target, config, seed=0, tau_steps=1, chunk_slots=64, context=ranks)
    return draft_class(shape), objective


def exchanged(directory):
    """Bytes of the collectives of keys and values in a step: of the target, the draft, and its gradients."""
    titan.bind_device("cpu")
    dims = parallelism.mesh(ParallelismConfig(shard=-1, context=dist.get_world_size()))
    ranks, result = parallelism.context_group(dims), {}
    target = HFTarget(directory, aux_layers=[1, 2, 3], dtype=torch.bfloat16)
    for name, config in SHARED.items():
        totals = {"target": 0, "draft": 0, "gradients": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(context_parallel, "_all_gather", counting_all_gather(totals, ranks))
            patch.setattr(context_parallel, "_reduce_scatter", counting_reduce_scatter(totals))
            train(*tiny_draft(config, target, ranks), target, dims)
        result[name] = totals
    return result


def counting_all_gather(totals, ranks, collective=context_parallel._all_gather):
    def count(out, part, group):
        totals["target" if group is ranks.prefetch_group else "draft"] += out.nbytes
        assert part.nbytes * group.size() == out.nbytes
        collective(out, part, group=group)

    return count


def counting_reduce_scatter(totals, collective=context_parallel._reduce_scatter):
    def count(out, whole, group):
        totals["gradients"] += whole.nbytes
        collective(out, whole, group=group)

    return count


def train(draft, objective, target, dims):
    """A step, as the trainer takes it."""
    draft.set_vocab_mapping(VocabMapping(torch.arange(48), TINY.vocab_size, 1.0))
    trainee = parallelism.shard_draft(TTTModule(draft.attach(target), objective), dims, torch.bfloat16)
    schedules = [objective.schedule(tiny_batch()) for _ in range(MICRO_BATCHES)]
    assert all(len(schedule.chunks) > 1 for schedule in schedules)
    for schedule in schedules:
        trainee(
            schedule, target.compute_hidden_states(schedule.batch), sum(s.counts for s in schedules)
        ).loss.backward()


def tiny_work(config):
    """The work of the first of two ranks; its exchanges follow from shapes alone."""
    draft, _ = tiny_draft(config, None, ContextGroup.planned(2))
    training = Training(TrainJob(draft=config), TINY, draft.shape, None)
    return Work(training, None, tiny_batch().num_tokens, MICRO_BATCHES)


def test_counted_keys_and_values_equal_those_that_two_ranks_exchange(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for measured in on_ranks(2, exchanged, str(tmp_path)):
        for name, config in SHARED.items():
            work = tiny_work(config)
            counted = {key: work.rows * e.layers * e.size for key, e in vars(Exchanges.of(work)).items()}
            assert counted == measured[name] and min(counted.values()) > 0, name


def test_keys_and_values_of_the_published_shape_are_those_of_long_context_md():
    """131072 tokens of an 8B Llama among eight ranks, in decimal MB: 470 a layer, 940 of gradients."""
    of_all = Exchange(1, 131072 * 2 * 1024 * 2), Exchange(1, 131072 * 2 * 1024 * 4)
    assert [round(one.sent(8) / 1e6) for one in of_all] == [470, 940]
    training = Training.of("8b")
    exchanges = Exchanges.of(training.work(one_row(4096, 1), 1, 8))
    assert exchanges.target == Exchange(32, of_all[0].size / 32)
    assert (exchanges.draft, exchanges.gradients) == tuple(Exchange(1, one.size / 32) for one in of_all)


def test_a_shared_row_adds_its_exchanges_and_masks_to_the_step():
    training = Training.of("8b")
    a = Assumptions(rows=2, masked=0.25, flops=1e14, nvlink=1e11, **NO_HOPS)
    work = training.work(one_row(4096, 1), a.rows * 4, 4)
    unshared = step(work, FSDP2, Replicated(), 8, a)
    result = shared(work, Replicated(), 4, 8, a)
    scores = work.target_attention
    row = 4096 * 2 * 1024
    assert result.exchanges == pytest.approx(8 * 3 / 4 * row * (32 * 2 + 2 + 4) / 1e11)
    assert result.target == pytest.approx((work.target + 3 * scores) / 1e14)
    assert result.step.seconds == pytest.approx(unshared.seconds + result.exchanges + 3 * scores / 1e14)
    assert (result.step.bytes, result.step.computing) == (unshared.bytes, unshared.computing)
    # On one GPU nothing is added.
    whole = training.work(one_row(4096, 1), a.rows)
    assert shared(whole, Replicated(), 1, 8, a).step == step(whole, FSDP2, Replicated(), 8, a)
    # A quarter of four times as many rows has a few more tokens: the halos after the parts.
    assert whole.target < work.target < 1.02 * whole.target


def test_the_first_of_the_gpus_that_share_a_row_has_the_most_work(monkeypatch):
    training, row = Training.of("8b"), one_row(32768, 1)

    def flops(rank):
        group = SimpleNamespace(size=lambda: 4, rank=lambda: rank)
        monkeypatch.setattr(ContextGroup, "planned", classmethod(lambda cls, ranks: cls(group)))
        work = training.work(row, 1, 4)
        return work.target + work.draft

    first, *others = map(flops, range(4))
    assert first > max(others)


def test_every_assumption_is_printed_and_is_an_option(capsys):
    main(
        [
            "--target",
            "8b",
            "--gpus",
            "1,8",
            "--memory",
            "2e10",
            "--row-tokens",
            "512",
            "--long",
            "1024",
            "--sharing",
            "1,2",
        ]
    )
    out = capsys.readouterr().out
    assert out.count("assumed: ") == len(Assumptions.__dataclass_fields__) and "assumed: memory = 2e+10" in out
    assert "does not fit" in out and "| hsdp | features |" in out
    first, second = (line.split(" | ") for line in out.splitlines() if line.startswith("| 1024 |"))
    assert first[4] == "0.00 s, 0 GB" and first[7].startswith("does not fit: ")
    assert float(second[6]) < float(first[6])


def test_an_unknown_target_is_a_one_line_error():
    with pytest.raises(SystemExit, match="--target 3b: expected one of 8b, 70b"):
        main(["--target", "3b"])
