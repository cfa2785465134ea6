"""Which tokens are whose, and what is gathered of them."""

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.distributed.context_parallel import FULL_BATCH, NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.utils.errors import UserError
from tests.training.ranks import on_ranks

HALO = 3
SHAPES = [(1, 64), (3, 21), (2, 20), (1, 9)]
"""Rows and tokens of each: some that no number of chunks divides."""


def numbered(rows, length):
    """Every token's flat position and something beside it: float64 [B, L, 2]."""
    flat = torch.arange(rows * length, dtype=torch.float64)
    return torch.stack([flat, flat**2], dim=-1).view(rows, length, 2)


def shared():
    """What this rank finds of its share of each shape."""
    context, out = ContextGroup(dist.group.WORLD), []
    for rows, length in SHAPES:
        share = context.share(rows * length, HALO)
        x = numbered(rows, length)
        taken = share.take(x)[0].requires_grad_()
        keys, values = share.all_gather(taken[:, :1], taken[:, 1:, None])
        # A loss that is another one on every rank, and gives every token another gradient.
        weight = (dist.get_rank() + 1) * numbered(rows, length).flatten(0, 1)
        ((keys * weight[:, :1]).sum() + (values[..., 0] * weight[:, 1:]).sum()).backward()
        out.append(
            {
                "places": share.flat(torch.arange(len(taken))),
                "runs": [(run.start, run.stop) for run in share.runs(rows * length)],
                "taken": taken.detach(),
                "owned": share.mask_owned(1 + torch.arange(rows * length).expand(2, -1)),
                "keys": keys.detach(),
                "values": values.detach(),
                "gradient": taken.grad,
            }
        )
    return out


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    """Of each rank."""
    return on_ranks(request.param, shared)


@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_chunks_and_halos(found, which):
    rows, length = SHAPES[which]
    count, owners = rows * length, torch.zeros(rows * length, dtype=torch.long)
    for one in (rank[which] for rank in found):
        places = one["places"]
        assert torch.equal(one["taken"], numbered(rows, length).flatten(0, 1)[places])
        assert torch.equal(torch.cat([torch.arange(*run) for run in one["runs"]]), places)
        mask_owned = one["owned"][0].nonzero()[:, 0]
        assert torch.equal(one["owned"][:, mask_owned], 1 + places[mask_owned].expand(2, -1))
        assert abs(len(mask_owned) - count / len(found)) <= 2
        owners[places[mask_owned]] += 1
        # What a slot reads behind it lies behind it here too.
        for ahead in range(1, HALO + 1):
            inside = places[mask_owned] + ahead < count
            assert torch.equal(places[(mask_owned + ahead)[inside]], (places[mask_owned] + ahead)[inside])
    assert torch.equal(owners, torch.ones_like(owners))


@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_what_is_gathered_is_whole_and_gradients_go_home(found, which):
    x = numbered(*SHAPES[which]).flatten(0, 1)
    ranks = sum(range(1, len(found) + 1))
    for one in (rank[which] for rank in found):
        assert torch.equal(one["keys"], x[:, :1]) and torch.equal(one["values"], x[:, 1:, None])
        mine = (one["owned"][0] > 0)[:, None]
        torch.testing.assert_close(one["gradient"], ranks * x[one["places"]] * mine)


def test_causal_work_is_about_the_same_on_every_rank(found):
    """One document: a token sees those before it."""
    work = [float((rank[0]["owned"][0]).sum()) for rank in found]
    assert max(work) <= 1.1 * min(work)


def test_a_rank_alone_has_everything_as_it_is():
    x = torch.randn(2, 8, 3)
    share = NO_CONTEXT_PARALLELISM.share(16, HALO)
    assert share is FULL_BATCH and share.take(x) is x and share.mask_owned(x) is x and share.all_gather(x)[0] is x


def too_few():
    try:
        ContextGroup(dist.group.WORLD).share(3, HALO)
    except UserError as error:
        return str(error)
    return ""


def test_fewer_tokens_than_chunks_are_refused():
    for said in on_ranks(2, too_few):
        assert said.startswith("data.row_tokens: a micro-batch has 3 tokens, and parallelism.context=2")


def in_bfloat16():
    """Next to 1, bfloat16 has steps of 2^-7."""
    share = ContextGroup(dist.group.WORLD).share(8, 0)
    x = torch.zeros(8 // dist.get_world_size(), 1, dtype=torch.bfloat16, requires_grad=True)
    (found,) = share.all_gather(x)
    (found * (1.0 if dist.get_rank() == 0 else 2**-9)).sum().backward()
    return x.grad


def test_gradients_of_several_ranks_are_added_up_exactly():
    for gradient in on_ranks(4, in_bfloat16):
        assert gradient.dtype == torch.bfloat16 and gradient.unique().tolist() == [1 + 2**-7]
