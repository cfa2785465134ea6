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
    Assumed,
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
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.packing import collate
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.distributed import context_parallel, parallelism, titan
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.trainer import TTTModule
from tests.conftest import make_tokenizer
from tests.training.ranks import on_ranks

NO_HOPS = {"hop": 0.0, "far_hop": 0.0}
A = Assumed(nvlink=100.0, nic=10.0, **NO_HOPS)


def sent_by_a_rank_in_a_ring(ranks, size):
    """Chunk by chunk: every rank passes on what it got last, until all have all."""
    chunk, sent = size / ranks, 0.0
    has = [{rank} for rank in range(ranks)]
    last = list(range(ranks))
    while any(len(mine) < ranks for mine in has):
        last = [last[rank - 1] for rank in range(ranks)]
        for rank, got in enumerate(last):
            has[rank].add(got)
        sent += chunk
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_sends_what_its_ranks_pass_on(ranks):
    assert Ring.neighbours(ranks, A).gather(4200.0, A) * A.nvlink == pytest.approx(
        sent_by_a_rank_in_a_ring(ranks, 4200)
    )


def test_a_ring_has_the_bandwidth_of_its_narrowest_link():
    assert Ring(8, 8).gather(800.0, A) == pytest.approx(7 / 8 * 800 / 100)  # inside a node
    assert Ring(16, 8).gather(800.0, A) == pytest.approx(15 / 16 * 800 / 80)  # eight cards of 10 each
    assert Ring(16, 1).gather(800.0, A) == pytest.approx(15 / 16 * 800 / 10)  # one of each node
    assert Ring(2, 1).all_reduce(800.0, A) == pytest.approx(2 * 1 / 2 * 800 / 10)


def test_a_ring_waits_for_every_hop():
    a = Assumed(hop=1.0, far_hop=3.0)
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
        # Inside the node, and an eighth of it with the same GPU of seven other nodes, over one card.
        (HSDP, 64, 7 / 8 * 2 / 100, 7 / 8 * 4 / 100 + 2 * 7 / 8 * (4 / 8) / 10),
    ],
)
def test_a_draft_gathers_bfloat16_and_reduces_float32(draft, gpus, gathered, reduced):
    assert draft.gather(1000, gpus, A) == pytest.approx(1000 * gathered)
    assert draft.reduce(1000, gpus, A) == pytest.approx(1000 * reduced)


@pytest.fixture(scope="module")
def found():
    """Work of Llama-3.1-8B on rows of 512 tokens."""
    return Training.of("8b").work(one_row(512, 4), 3)


def test_the_work_is_that_of_the_published_shape(found):
    work = found
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    scores = 4 * 128 * 128 / 2 * 4096 * 2  # four documents of 128 tokens; scores and their values
    assert work.target == 2 * 3 * 32 * (512 * layer + scores)
    assert work.layers_bytes == 2 * (32 * (layer + 2 * 4096) + 4096)  # with the norms
    assert work.states_bytes == 3 * 512 * 4 * 4096 * 2


def test_a_step_is_the_sum_of_what_waits_for_each_other(found):
    work = found
    slow = Assumed(rows=3, row_tokens=512, flops=1e12, hbm=1e30, nvlink=1e11, **NO_HOPS)
    parameters = work.models.draft_parameters
    one = step(work, DDP, Replicated(), 1, slow)
    assert one.seconds == pytest.approx((work.target + work.draft) / 1e12) and one.computing == pytest.approx(
        one.seconds
    )
    # The gather hides behind the target, the reduction does not.
    eight = step(work, FSDP2, Replicated(), 8, slow)
    assert eight.seconds - one.seconds == pytest.approx(7 / 8 * 4 * parameters / 1e11)
    assert eight.computing == one.computing and eight.bytes < one.bytes


def test_a_sharded_target_takes_the_longer_of_gathering_and_computing(found):
    work = found
    for nvlink in (1e9, 1e15):
        a = Assumed(flops=1e15, nvlink=nvlink, **NO_HOPS)
        gathering = work.rows * 7 / 8 * work.layers_bytes / nvlink
        # The embedding twice, for target and draft, and the head.
        ends = work.rows * 7 / 8 * 3 * (128256 * 4096 * 2) / nvlink
        assert Sharded().seconds(work, 8, a) == pytest.approx(max(work.target / 1e15, gathering) + ends)
    assert (Sharded().share(512, a), TensorParallel().share(512, a)) == (1 / 512, 1 / 8)


def test_a_tensor_parallel_target_waits_for_two_sums_a_layer(found):
    work = found
    a = Assumed(flops=1e15, nvlink=1e11, **NO_HOPS)
    activations = 8 * 512 * 4096 * 2  # the rows of all eight ranks
    sums = 3 * 32 * 2 * (2 * 7 / 8 * activations / 1e11)
    ends = 3 * 3 * 7 / 8 * (128256 * 4096 * 2) / 1e11
    assert TensorParallel().seconds(work, 8, a) == pytest.approx(work.target / 1e15 + sums + ends)


def test_targets_that_ranks_hold_together_are_counted_as_the_plan_counts_them(found, monkeypatch):
    work = found

    def bytes_of(target, work=work):
        return step(work, HSDP, target, 8, Assumed()).bytes

    # In turn with the draft nothing lies there for the next micro-batch.
    ahead = work.states_bytes / work.rows + work.batch.forward_bytes
    held = 7 / 8 * (work.layers_bytes + 2 * work.end_bytes) - work.end_bytes  # which the head, whole, takes
    assert bytes_of(Replicated()) - bytes_of(TensorParallel()) == pytest.approx(held + ahead)
    # Threads read two micro-batches of features ahead; of one server one is asked for.
    assert bytes_of(CACHED) - bytes_of(SERVED) == pytest.approx(work.states_bytes / work.rows)
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 31)  # more than a backward leaves free
    some = bytes_of(Sharded())
    # They may take the place of gradients, but for those of earlier micro-batches.
    assert bytes_of(Sharded(), replace(work, rows=1)) < some
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 32)
    assert bytes_of(Sharded()) - some == pytest.approx(work.layers_bytes / 32)


@pytest.mark.parametrize(("target", "link"), [(SERVED, "nic"), (CACHED, "storage")])
def test_states_from_elsewhere_cost_no_products_and_bound_a_step_by_their_link(found, target, link):
    work = found
    bound = step(work, DDP, target, 1, Assumed(**{link: 1e3}))
    assert bound.seconds == pytest.approx(work.states_bytes / 1e3)
    free = step(work, DDP, target, 1, Assumed(**{link: 1e30}, hbm=1e30))
    assert free.seconds == pytest.approx(work.draft / Assumed().flops) == free.computing


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
    """Two rows, of which so much is supervised that every rank has its slots in several parts."""
    documents = [[TokenRow(name, [3] * n, [t > 10 for t in range(n)], "")] for name, n in (("a", 200), ("b", 170))]
    return collate(documents, 200, pad_id=0)


def tiny_draft(config, target, ranks):
    """Draft and objective."""
    draft_class = get_class(config._target_)
    shape = draft_class.shape_for(config, TINY, [1, 2, 3], 48)
    objective = get_class(config.objective).build(target, config, seed=0, tau_steps=1, chunk_slots=64, context=ranks)
    return draft_class(shape), objective


def exchanged(directory):
    """Bytes of the collectives of keys and values that a step takes: of the target, the draft, and its gradients."""
    titan.bind_device("cpu")
    dims = parallelism.mesh(ParallelismConfig(shard=-1, context=dist.get_world_size()))
    ranks, found = parallelism.context_group(dims), {}
    target = HFTarget(directory, aux_layers=[1, 2, 3], dtype=torch.bfloat16)
    for name, config in SHARED.items():
        seen = {"target": 0, "draft": 0, "gradients": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(context_parallel, "_all_gather", gathered(seen, ranks))
            patch.setattr(context_parallel, "_reduce_scatter", scattered(seen))
            train(*tiny_draft(config, target, ranks), target, dims)
        found[name] = seen
    return found


def gathered(seen, ranks, collective=context_parallel._all_gather):
    def counted(out, given, group):
        seen["target" if group is ranks.prefetch_group else "draft"] += out.nbytes
        assert given.nbytes * group.size() == out.nbytes
        collective(out, given, group=group)

    return counted


def scattered(seen, collective=context_parallel._reduce_scatter):
    def counted(out, given, group):
        seen["gradients"] += given.nbytes
        collective(out, given, group=group)

    return counted


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


def test_as_many_keys_and_values_are_counted_as_two_ranks_exchange(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for found in on_ranks(2, exchanged, str(tmp_path)):
        for name, config in SHARED.items():
            work = tiny_work(config)
            counted = {key: work.rows * e.layers * e.size for key, e in vars(Exchanges.of(work)).items()}
            assert counted == found[name] and min(counted.values()) > 0, name


def test_the_keys_and_values_of_the_published_shape_are_those_of_long_context_md():
    """131072 tokens of an 8B Llama among eight ranks, in decimal MB: 470 a layer, 940 of gradients."""
    of_all = Exchange(1, 131072 * 2 * 1024 * 2), Exchange(1, 131072 * 2 * 1024 * 4)
    assert [round(one.sent(8) / 1e6) for one in of_all] == [470, 940]
    training = Training.of("8b")
    exchanges = Exchanges.of(training.work(one_row(4096, 1), 1, 8))
    assert exchanges.target == Exchange(32, of_all[0].size / 32)
    assert (exchanges.draft, exchanges.gradients) == tuple(Exchange(1, one.size / 32) for one in of_all)


def test_a_row_that_is_shared_takes_its_exchanges_and_the_masks_of_its_parts_on_top():
    training = Training.of("8b")
    a = Assumed(rows=2, masked=0.25, flops=1e14, nvlink=1e11, **NO_HOPS)
    work = training.work(one_row(4096, 1), a.rows * 4, 4)
    alone = step(work, FSDP2, Replicated(), 8, a)
    found = shared(work, Replicated(), 4, 8, a)
    scores = work.target_attention
    row = 4096 * 2 * 1024
    assert found.exchanges == pytest.approx(8 * 3 / 4 * row * (32 * 2 + 2 + 4) / 1e11)
    assert found.target == pytest.approx((work.target + 3 * scores) / 1e14)
    assert found.step.seconds == pytest.approx(alone.seconds + found.exchanges + 3 * scores / 1e14)
    assert (found.step.bytes, found.step.computing) == (alone.bytes, alone.computing)
    # Nobody to share with: nothing on top.
    whole = training.work(one_row(4096, 1), a.rows)
    assert shared(whole, Replicated(), 1, 8, a).step == step(whole, FSDP2, Replicated(), 8, training.job.optimizer, a)
    # A quarter of four times as many rows: a few tokens more, that lie behind the parts.
    assert whole.target < work.target < 1.02 * whole.target


def test_the_others_wait_for_the_first_of_the_gpus_that_share_a_row(monkeypatch):
    training, row = Training.of("8b"), one_row(32768, 1)

    def flops(rank):
        group = SimpleNamespace(size=lambda: 4, rank=lambda: rank)
        monkeypatch.setattr(ContextGroup, "planned", classmethod(lambda cls, ranks: cls(group)))
        work = training.work(row, 1, 4)
        return work.target + work.draft

    first, *others = map(flops, range(4))
    assert first > max(others)


def test_every_assumption_is_said_and_can_be_given(capsys):
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
    said = capsys.readouterr().out
    assert said.count("assumed: ") == len(Assumed.__dataclass_fields__) and "assumed: memory = 2e+10" in said
    assert "does not fit" in said and "| hsdp | features |" in said
    first, second = (line.split(" | ") for line in said.splitlines() if line.startswith("| 1024 |"))
    assert first[4] == "0.00 s, 0 GB" and first[7].startswith("does not fit: ")
    assert float(second[6]) < float(first[6])


def test_a_target_that_is_not_known_is_one_line():
    with pytest.raises(SystemExit, match="--target 3b: expected one of 8b, 70b"):
        main(["--target", "3b"])
