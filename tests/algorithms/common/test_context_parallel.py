"""Ranks that share the tokens of a batch compute the loss and gradients of one rank."""

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.config.schema import DepthSampling, FeatureNoise, MaskConvention, Normalization
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from tests.algorithms.cases import eagle, eagle3, lay_out, make_documents
from tests.training.ranks import on_ranks

CASES = {
    "eagle3": eagle3(draft_vocab=15),
    "eagle3.1 of two layers": eagle3(num_layers=2, fc_norm=True, norm_output=True),
    "eagle1": eagle(),
    "hass of two layers, with noise": eagle(num_steps=3, num_layers=2, noise=FeatureNoise.official, topk_w=0.5),
}
SETTINGS = {
    "serving": {},
    "official, in parts": {"mask_convention": MaskConvention.official, "chunk_slots": 64},
    "automodel, by conversation": {
        "mask_convention": MaskConvention.automodel, "normalization": Normalization.conversation, "chunk_slots": 1
    },
    "depths": {"depth_sampling": DepthSampling.geometric},
    "skips": {"position_offset": 400},
}  # fmt: skip
WHICH = [
    *(("eagle3", setting) for setting in SETTINGS),
    ("eagle3.1 of two layers", "official, in parts"),
    ("eagle3.1 of two layers", "skips"),
    ("eagle1", "automodel, by conversation"),
    ("hass of two layers, with noise", "depths"),
]
LAYOUTS = [
    # Documents of every length across the borders of chunks; slots right in front of them and behind them.
    ([[41, 20], [3, 58], [64]], 64),
    # One long document, and as many tokens as no number of chunks divides.
    ([[301]], 301),
    # All that is supervised belongs to one rank; and a batch in which nothing is.
    ([[7]], 96),
    ([[3], []], 24),
]
"""Micro-batches: lengths of the documents of each row, and the tokens of a row."""


def micro_batches():
    torch.manual_seed(0)
    return [
        lay_out([make_documents(lengths, seed=n) for n, lengths in enumerate(rows)], width) for rows, width in LAYOUTS
    ]


def trained(case, context, **settings):
    """Sums, metrics and gradients of a global batch of several micro-batches, as far as this rank has them."""
    draft, objective = case.make_draft(), case.make_objective(context=context, **settings)
    made = [(objective.schedule(batch), supervision) for batch, supervision in micro_batches()]
    counts = sum(schedule.counts for schedule, _ in made)
    if context.group:
        dist.all_reduce(counts, group=context.group)
    loss, sums = torch.zeros(()), {}
    for schedule, supervision in made:
        out = objective.loss(draft, schedule, supervision.shard(schedule.batch.shard), counts)
        out.loss.backward()
        loss = loss + out.loss.detach()
        sums = {name: value + sums.get(name, 0) for name, value in out.sums.items()}
    return {"total": loss, **sums, **{n: p.grad for n, p in draft.named_parameters()}}


def together():
    """The results of :func:`trained` for each of ``WHICH``, summed over the ranks."""
    found = [trained(CASES[case], ContextGroup(dist.group.WORLD), **SETTINGS[setting]) for case, setting in WHICH]
    for sums in found:
        for value in sums.values():
            dist.all_reduce(value)
    return found


@pytest.fixture(scope="module")
def found():
    """Results by the number of ranks."""
    alone = [trained(CASES[case], NO_CONTEXT_PARALLELISM, **SETTINGS[setting]) for case, setting in WHICH]
    return {1: alone} | {ranks: on_ranks(ranks, together)[0] for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("which", range(len(WHICH)), ids=map(", ".join, WHICH))
def test_loss_sums_and_gradients_are_those_of_one_rank(found, ranks, which):
    alone, together = found[1][which], found[ranks][which]
    assert float(alone["total"]) > 0
    for name, expected in alone.items():
        error = float((together[name] - expected).norm() / expected.norm().clamp(min=1e-30))
        assert error <= 2e-6, f"{name}: {error:.1e}"


def own_slots():
    """The flat positions of this rank's supervised slots, and those of its keys."""
    batch, _ = lay_out([make_documents([200])], 256)
    case = CASES["eagle3"]
    schedule = case.make_objective(context=ContextGroup(dist.group.WORLD)).schedule(batch)
    (part,) = schedule.chunks
    at = schedule.batch.shard.to_global(part.slots.host_index[part.slots.real])
    return {"slots": at, "tokens": torch.tensor(len(schedule.layout.position_ids)), "counts": schedule.counts}


def test_a_rank_unrolls_its_own_slots_only():
    batch, _ = lay_out([make_documents([200])], 256)
    expected = CASES["eagle3"].make_objective().schedule(batch)
    found = on_ranks(4, own_slots)
    slots = torch.cat([rank["slots"] for rank in found])
    (part,) = expected.chunks
    assert torch.equal(slots.sort().values, part.slots.host_index[part.slots.real].sort().values)
    torch.testing.assert_close(sum(rank["counts"] for rank in found), expected.counts)
    halo = CASES["eagle3"].num_steps
    assert all(64 <= int(rank["tokens"]) <= 64 + 2 * halo for rank in found)
