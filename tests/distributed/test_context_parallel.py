"""Assignment of tokens to context-parallel ranks, and gathering of them."""

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.context_parallel import FULL_BATCH, NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.utils.errors import UserError
from tests.training.ranks import on_ranks

HALO = 3
SHAPES = [(1, 64), (3, 21), (2, 20), (1, 9)]
"""Rows and tokens per row, among them sums that no number of chunks divides."""


def numbered(rows, length):
    """Every token's global position and its square: float64 [B, L, 2]."""
    flat = torch.arange(rows * length, dtype=torch.float64)
    return torch.stack([flat, flat**2], dim=-1).view(rows, length, 2)


def shards():
    """This rank's shard of each shape."""
    context, out = ContextGroup(dist.group.WORLD), []
    for rows, length in SHAPES:
        shard = context.shard(rows * length, HALO)
        x = numbered(rows, length)
        taken = shard.local(x)[0].requires_grad_()
        keys, values = shard.all_gather(taken[:, :1], taken[:, 1:, None])
        # The loss differs between ranks, and the gradient between tokens.
        weight = (dist.get_rank() + 1) * numbered(rows, length).flatten(0, 1)
        ((keys * weight[:, :1]).sum() + (values[..., 0] * weight[:, 1:]).sum()).backward()
        out.append(
            {
                "positions": shard.to_global(torch.arange(len(taken))),
                "ranges": [(r.start, r.stop) for r in shard.ranges(rows * length)],
                "taken": taken.detach(),
                "owned": shard.mask_owned(1 + torch.arange(rows * length).expand(2, -1)),
                "keys": keys.detach(),
                "values": values.detach(),
                "gradient": taken.grad,
            }
        )
    return out


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    """Shards of each rank."""
    return on_ranks(request.param, shards)


@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_chunks_and_halos(results, which):
    rows, length = SHAPES[which]
    count, owners = rows * length, torch.zeros(rows * length, dtype=torch.long)
    for one in (rank[which] for rank in results):
        positions = one["positions"]
        assert torch.equal(one["taken"], numbered(rows, length).flatten(0, 1)[positions])
        assert torch.equal(torch.cat([torch.arange(*r) for r in one["ranges"]]), positions)
        owned = one["owned"][0].nonzero()[:, 0]
        assert torch.equal(one["owned"][:, owned], 1 + positions[owned].expand(2, -1))
        assert abs(len(owned) - count / len(results)) <= 2
        owners[positions[owned]] += 1
        # Tokens that a slot reads after its own are neighbors in the shard too.
        for ahead in range(1, HALO + 1):
            inside = positions[owned] + ahead < count
            assert torch.equal(positions[(owned + ahead)[inside]], (positions[owned] + ahead)[inside])
    assert torch.equal(owners, torch.ones_like(owners))


@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_gathered_tensors_are_complete_and_gradients_return_to_their_owners(results, which):
    x = numbered(*SHAPES[which]).flatten(0, 1)
    ranks = sum(range(1, len(results) + 1))
    for one in (rank[which] for rank in results):
        assert torch.equal(one["keys"], x[:, :1]) and torch.equal(one["values"], x[:, 1:, None])
        mine = (one["owned"][0] > 0)[:, None]
        torch.testing.assert_close(one["gradient"], ranks * x[one["positions"]] * mine)


def test_causal_work_is_balanced_over_ranks(results):
    """One document: a token attends to those before it."""
    work = [float((rank[0]["owned"][0]).sum()) for rank in results]
    assert max(work) <= 1.1 * min(work)


def test_without_context_parallelism_tensors_are_unchanged():
    x = torch.randn(2, 8, 3)
    shard = NO_CONTEXT_PARALLELISM.shard(16, HALO)
    assert shard is FULL_BATCH and shard.local(x) is x and shard.mask_owned(x) is x and shard.all_gather(x)[0] is x


def too_few():
    try:
        ContextGroup(dist.group.WORLD).shard(3, HALO)
    except UserError as error:
        return str(error)
    return ""


def test_fewer_tokens_than_chunks_are_rejected():
    for message in on_ranks(2, too_few):
        assert message.startswith("data.packed_length: a micro-batch has 3 tokens, and parallelism.context=2")


def bfloat16_gradient():
    """Around 1, bfloat16 has steps of 2^-7."""
    shard = ContextGroup(dist.group.WORLD).shard(8, 0)
    x = torch.zeros(8 // dist.get_world_size(), 1, dtype=torch.bfloat16, requires_grad=True)
    (gathered,) = shard.all_gather(x)
    (gathered * (1.0 if dist.get_rank() == 0 else 2**-9)).sum().backward()
    return x.grad


def test_gradients_of_several_ranks_are_summed_exactly():
    for gradient in on_ranks(4, bfloat16_gradient):
        assert gradient.dtype == torch.bfloat16 and gradient.unique().tolist() == [1 + 2**-7]
