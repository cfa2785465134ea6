"""Context parallelism: which tokens of a batch a rank computes, and how it comes by the keys and values of the others.

The B rows of L tokens of a batch are laid end to end and cut into 2c chunks; rank r of c owns chunks r and 2c - 1 - r,
so that causal attention costs all of them about the same.  Attention alone looks further than one token: it gathers
keys and values from all ranks (Llama 3, 2407.21783, section 3.3.2).  Behind each of its chunks a rank computes a few
tokens more, the halo, that it does not own: what its slots read there, nobody has to send.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.precision import exact

# torch 2.13 calls both otherwise.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextShard:
    """What a rank computes of a batch of N = B * L tokens: m of them, in ascending order.  Here all, where they are."""

    @property
    def first(self) -> bool:
        """Whether this rank is the one of those that share the batch that does what is to be done once for it."""
        return True

    def runs(self, num_tokens: int) -> Sequence[range]:
        """The flat positions, as ranges."""
        return [range(num_tokens)]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The share of x [B, L, ...]: [1, m, ...], or where it is all of it x as it is."""
        return x

    def mask_owned(self, x: torch.Tensor) -> torch.Tensor:
        """The share of x [..., N] without what other ranks own: [..., m], zeros there."""
        return x

    def flat(self, index: torch.Tensor) -> torch.Tensor:
        """The flat positions of ``index``, int64 [n] on the host, counted within the share."""
        return index

    def all_gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From [m, ...] of the share [N, ...] of the batch, gathered from their owners; gradients go back to them."""
        return tensors

    def beside(self) -> "ContextShard":
        """The same for work that runs beside that of the draft, and must not wait for what that exchanges."""
        return self


FULL_BATCH = ContextShard()


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the tokens of a batch."""

    group: dist.ProcessGroup | None = None
    """None: this rank has them all."""
    group_beside: dist.ProcessGroup | None = None
    """The same ranks by other connections."""

    @classmethod
    def planned(cls, ranks: int) -> "ContextGroup":
        """That of the first of so many ranks, which need not be there: it says what is whose, and gathers nothing."""
        return cls(SimpleNamespace(size=lambda: ranks, rank=lambda: 0)) if ranks > 1 else NO_CONTEXT_PARALLELISM  # type: ignore[arg-type]

    def share(self, num_tokens: int, halo: int) -> ContextShard:
        """This rank's share of a batch.

        Args:
            halo: how many tokens behind a token its slot reads.

        Raises:
            UserError: there are fewer tokens than chunks.
        """
        if self.group is None:
            return FULL_BATCH
        chunks = 2 * self.group.size()
        if num_tokens < chunks:
            raise UserError(
                f"data.row_tokens: a micro-batch has {num_tokens} tokens, and parallelism.context={chunks // 2} cuts "
                f"it into {chunks} chunks; raise data.row_tokens, or lower parallelism.context"
            )
        return ChunkPairShard(self.group, self.group_beside, num_tokens, halo)


NO_CONTEXT_PARALLELISM = ContextGroup()


@dataclass(frozen=True)
class ChunkPairShard(ContextShard):
    """Two of 2c chunks; see the module's text."""

    group: dist.ProcessGroup
    group_beside: dist.ProcessGroup | None
    num_tokens: int
    halo: int

    @cached_property
    def _chunks(self) -> list[list[range]]:
        """The chunks of each rank; their lengths differ by one token at most."""
        count = self.group.size()
        edges = [n * self.num_tokens // (2 * count) for n in range(2 * count + 1)]
        chunks = [range(start, end) for start, end in pairwise(edges)]
        return [[chunks[rank], chunks[-1 - rank]] for rank in range(count)]

    @cached_property
    def _runs(self) -> list[range]:
        first, second = self._chunks[self.group.rank()]
        last = range(second.start, min(second.stop + self.halo, self.num_tokens))
        if first.stop == second.start:
            return [range(first.start, last.stop)]
        return [range(first.start, min(first.stop + self.halo, self.num_tokens)), last]

    @cached_property
    def _flat(self) -> torch.Tensor:
        """int64 [m], on the host."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self._runs])

    @cached_property
    def _own(self) -> list[slice]:
        """Where the rank's chunks lie in the share."""
        first, second = self._chunks[self.group.rank()]
        start = len(self._flat) - (self._runs[-1].stop - second.start)
        return [slice(0, len(first)), slice(start, start + len(second))]

    @property
    def _padded(self) -> int:
        """The length of the longest chunk."""
        return -(-self.num_tokens // (2 * self.group.size()))

    @property
    def first(self) -> bool:
        return self.group.rank() == 0

    def runs(self, num_tokens: int) -> Sequence[range]:
        return self._runs

    def take(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        return torch.cat([flat[run.start : run.stop] for run in self._runs])[None]

    def mask_owned(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(*x.shape[:-1], len(self._flat))
        for own, chunk in zip(self._own, self._chunks[self.group.rank()], strict=True):
            out[..., own] = x[..., chunk.start : chunk.stop]
        return out

    def flat(self, index: torch.Tensor) -> torch.Tensor:
        return self._flat[index]

    def all_gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = torch.cat([x.flatten(1) for x in tensors], dim=1)
        found = _Gather.apply(packed, self).split([x[0].numel() for x in tensors], dim=1)
        return tuple(part.unflatten(1, x.shape[1:]) for part, x in zip(found, tensors, strict=True))

    def beside(self) -> ContextShard:
        return replace(self, group=self.group_beside or self.group)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[m, w] → [N, w]"""
        sent = x.new_empty(2, self._padded, x.shape[1])
        for chunk, own in zip(sent, self._own, strict=True):
            chunk[: own.stop - own.start] = x[own]
        found = x.new_empty(self.group.size(), *sent.shape)
        _all_gather(found.flatten(0, 2), sent.flatten(0, 1), group=self.group)
        return torch.cat([found[rank, half, :length] for rank, half, length in self._in_order()])

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`gather`: the sums over all ranks of [N, w] → [m, w], zeros in the halo."""
        sent = x.new_zeros(self.group.size(), 2, self._padded, x.shape[1], dtype=exact(x.dtype))
        parts = x.split([length for *_, length in self._in_order()])
        for (rank, half, length), part in zip(self._in_order(), parts, strict=True):
            sent[rank, half, :length] = part
        found = torch.empty_like(sent[0])
        _reduce_scatter(found.flatten(0, 1), sent.flatten(0, 2), group=self.group)
        out = x.new_zeros(len(self._flat), x.shape[1])
        for chunk, own in zip(found, self._own, strict=True):
            out[own] = chunk[: own.stop - own.start]
        return out

    def _in_order(self) -> Iterator[tuple[int, int, int]]:
        """Owner, which of its two, and length of each chunk, as they follow each other in the batch."""
        for half in (0, 1):
            for rank in sorted(range(self.group.size()), reverse=bool(half)):
                yield rank, half, len(self._chunks[rank][half])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, share: ChunkPairShard) -> torch.Tensor:
        ctx.share = share
        return share.gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.share.scatter(gradients[0]), None
