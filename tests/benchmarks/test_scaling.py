"""The arithmetic of ``benchmarks.scaling``, by hand."""

from dataclasses import replace

import pytest

from benchmarks.scaling import (
    CACHED,
    DDP,
    FSDP2,
    HSDP,
    SERVED,
    Assumed,
    Replicated,
    Ring,
    Sharded,
    TensorParallel,
    main,
    step,
    work_of,
)
from nemo_speculative.config.schema import ShardedHFBackendConfig

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
    """Work of Llama-3.1-8B on rows of 512 tokens, and the optimizer."""
    return work_of("8b", Assumed(rows=3, row_tokens=512))


def test_the_work_is_that_of_the_published_shape(found):
    work, _ = found
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    scores = 4 * 128 * 129 / 2 * 4096 * 2  # four documents of 128 tokens; scores and their values
    assert work.target == 2 * 3 * 32 * (512 * layer + scores)
    assert work.layers_bytes == 2 * (32 * (layer + 2 * 4096) + 4096)  # with the norms
    assert work.states_bytes == 3 * 512 * 4 * 4096 * 2


def test_a_step_is_the_sum_of_what_waits_for_each_other(found):
    work, optimizer = found
    slow = Assumed(rows=3, row_tokens=512, flops=1e12, hbm=1e30, nvlink=1e11, **NO_HOPS)
    parameters = work.models.draft.all_parameters
    one = step(work, DDP, Replicated(), 1, optimizer, slow)
    assert one.seconds == pytest.approx((work.target + work.draft) / 1e12) and one.computing == pytest.approx(
        one.seconds
    )
    # The gather hides behind the target, the reduction does not.
    eight = step(work, FSDP2, Replicated(), 8, optimizer, slow)
    assert eight.seconds - one.seconds == pytest.approx(7 / 8 * 4 * parameters / 1e11)
    assert eight.computing == one.computing and eight.bytes < one.bytes


def test_a_sharded_target_takes_the_longer_of_gathering_and_computing(found):
    work, _ = found
    for nvlink in (1e9, 1e15):
        a = Assumed(flops=1e15, nvlink=nvlink, **NO_HOPS)
        gathering = work.rows * 7 / 8 * work.layers_bytes / nvlink
        assert Sharded().seconds(work, 8, a) == pytest.approx(max(work.target / 1e15, gathering))
    assert (Sharded().share(512, a), TensorParallel().share(512, a)) == (1 / 512, 1 / 8)


def test_a_tensor_parallel_target_waits_for_two_sums_a_layer(found):
    work, _ = found
    a = Assumed(flops=1e15, nvlink=1e11, **NO_HOPS)
    activations = 8 * 512 * 4096 * 2  # the rows of all eight ranks
    sums = 3 * 32 * 2 * (2 * 7 / 8 * activations / 1e11)
    assert TensorParallel().seconds(work, 8, a) == pytest.approx(work.target / 1e15 + sums)


def test_targets_that_ranks_hold_together_are_counted_as_the_plan_counts_them(found, monkeypatch):
    work, optimizer = found

    def bytes_of(target, work=work):
        return step(work, HSDP, target, 8, optimizer, Assumed()).bytes

    # In turn with the draft nothing lies there for the next micro-batch.
    ahead = work.states_bytes / work.rows + work.models.target.forward_bytes(work.amount, 2, 3)
    assert bytes_of(Replicated()) - bytes_of(TensorParallel()) == pytest.approx(7 / 8 * work.layers_bytes + ahead)
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 31)  # more than a backward leaves free
    some = bytes_of(Sharded())
    # They may take the place of gradients, but for those of earlier micro-batches.
    assert bytes_of(Sharded(), replace(work, rows=1)) < some
    monkeypatch.setattr(ShardedHFBackendConfig, "GATHERED_LAYERS", 32)
    assert bytes_of(Sharded()) - some == pytest.approx(work.layers_bytes / 32)


@pytest.mark.parametrize(("target", "link"), [(SERVED, "nic"), (CACHED, "storage")])
def test_states_from_elsewhere_cost_no_products_and_bound_a_step_by_their_link(found, target, link):
    work, optimizer = found
    bound = step(work, DDP, target, 1, optimizer, Assumed(**{link: 1e3}))
    assert bound.seconds == pytest.approx(work.states_bytes / 1e3)
    free = step(work, DDP, target, 1, optimizer, Assumed(**{link: 1e30}, hbm=1e30))
    assert free.seconds == pytest.approx(work.draft / Assumed().flops) == free.computing


def test_every_assumption_is_said_and_can_be_given(capsys):
    main(["--target", "8b", "--gpus", "1,8", "--memory", "2e10", "--row-tokens", "512"])
    said = capsys.readouterr().out
    assert said.count("assumed: ") == len(Assumed.__dataclass_fields__) and "assumed: memory = 2e+10" in said
    assert "does not fit" in said and "| hsdp | features |" in said


def test_a_target_that_is_not_known_is_one_line():
    with pytest.raises(SystemExit, match="--target 3b: expected one of 8b, 70b"):
        main(["--target", "3b"])
