"""Context parallelism: the tokens of a batch that a rank computes, and the gathering of the others' keys and values.

The B rows of L tokens of a batch are concatenated and cut into 2c chunks; rank r of c owns chunks r and 2c - 1 - r, so
that causal attention costs every rank about the same.  Only attention reads other ranks' tokens: it gathers keys and
values from all ranks (Llama 3, 2407.21783, section 3.3.2).  After each of its chunks a rank also computes a few tokens
that it does not own, the halo: they are what its slots read there, so nothing else has to be communicated.

A token's *global* position counts over the N = B * L tokens of the batch, its *local* one over the m tokens of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from nemo_speculative.utils.errors import UserError

# torch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextShard:
    """The m of N = B * L packed tokens that this rank computes, ascending; this base class: all N tokens, unchanged."""

    @property
    def is_first(self) -> bool:
        """Whether this rank does what has to be done once for the ranks that share the batch."""
        return True

    def ranges(self, num_tokens: int) -> Sequence[range]:
        """Global positions of the shard, as ascending ranges."""
        return [range(num_tokens)]

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """The shard of x [B, L, ...]: [1, m, ...]; without context parallelism x itself."""
        return x

    def mask_owned(self, x: torch.Tensor) -> torch.Tensor:
        """The shard of x [..., N], zero in the halo: [..., m]."""
        return x

    def to_global(self, index: torch.Tensor) -> torch.Tensor:
        """Global positions of local ones, int64 [n] on the host."""
        return index

    def all_gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, ...] of all ranks from the [m, ...] of each; gradients return to the owner of each token."""
        return tensors

    def for_prefetch(self) -> "ContextShard":
        """The same shard over separate connections, for work that overlaps with the draft's own communication."""
        return self


FULL_BATCH = ContextShard()


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the tokens of a batch, also over separate connections; None: no context parallelism."""

    group: dist.ProcessGroup | None = None
    prefetch_group: dist.ProcessGroup | None = None

    @classmethod
    def planned(cls, ranks: int) -> "ContextGroup":
        """Group of ``ranks`` as seen by its first rank, without processes: it assigns tokens but cannot communicate."""
        return cls(SimpleNamespace(size=lambda: ranks, rank=lambda: 0)) if ranks > 1 else NO_CONTEXT_PARALLELISM  # type: ignore[arg-type]

    def shard(self, num_tokens: int, halo: int) -> ContextShard:
        """This rank's shard of a batch in which a slot reads ``halo`` tokens after its own.

        Raises:
            UserError: there are fewer tokens than chunks.
        """
        if self.group is None:
            return FULL_BATCH
        chunks = 2 * self.group.size()
        if num_tokens < chunks:
            raise UserError(
                f"data.packed_length: a micro-batch has {num_tokens} tokens, and parallelism.context={chunks // 2} "
                f"cuts it into {chunks} chunks; raise data.packed_length, or lower parallelism.context"
            )
        return ChunkPairShard(self.group, self.prefetch_group, num_tokens, halo)


NO_CONTEXT_PARALLELISM = ContextGroup()


@dataclass(frozen=True)
class ChunkPairShard(ContextShard):
    """Two of 2c chunks, each with its halo; see the module's docstring."""

    group: dist.ProcessGroup
    prefetch_group: dist.ProcessGroup | None
    num_tokens: int
    halo: int

    @cached_property
    def _chunks(self) -> list[range]:
        """All 2c chunks; their lengths differ by at most one token."""
        count = 2 * self.group.size()
        edges = [n * self.num_tokens // count for n in range(count + 1)]
        return [range(start, end) for start, end in pairwise(edges)]

    @cached_property
    def _own_chunks(self) -> list[range]:
        return [self._chunks[self.group.rank()], self._chunks[-1 - self.group.rank()]]

    @cached_property
    def _ranges(self) -> list[range]:
        with_halo = [range(chunk.start, min(chunk.stop + self.halo, self.num_tokens)) for chunk in self._own_chunks]
        first, second = self._own_chunks
        return with_halo if first.stop < second.start else [range(first.start, with_halo[1].stop)]

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Global positions of the shard, int64 [m], on the host."""
        return torch.cat([torch.arange(r.start, r.stop) for r in self._ranges])

    @cached_property
    def _owned(self) -> list[slice]:
        """Local positions of the two chunks that this rank owns."""
        first, second = self._own_chunks
        start = len(self._positions) - (self._ranges[-1].stop - second.start)
        return [slice(0, len(first)), slice(start, start + len(second))]

    @property
    def _places(self) -> list[tuple[int, int, int]]:
        """Owner, index among the owner's two chunks, and length of every chunk."""
        last = len(self._chunks) - 1
        return [(min(n, last - n), int(2 * n > last), len(chunk)) for n, chunk in enumerate(self._chunks)]

    @property
    def is_first(self) -> bool:
        return self.group.rank() == 0

    def ranges(self, num_tokens: int) -> Sequence[range]:
        return self._ranges

    def local(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        return torch.cat([tokens[r.start : r.stop] for r in self._ranges])[None]

    def mask_owned(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(*x.shape[:-1], len(self._positions))
        for owned, chunk in zip(self._owned, self._own_chunks, strict=True):
            out[..., owned] = x[..., chunk.start : chunk.stop]
        return out

    def to_global(self, index: torch.Tensor) -> torch.Tensor:
        return self._positions[index]

    def all_gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = torch.cat([x.flatten(1) for x in tensors], dim=1)
        parts = _AllGatherTokens.apply(packed, self).split([x[0].numel() for x in tensors], dim=1)
        return tuple(part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True))

    def for_prefetch(self) -> ContextShard:
        return replace(self, group=self.prefetch_group or self.group)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[m, w] → [N, w]"""
        sent = x.new_empty(2, max(map(len, self._chunks)), x.shape[1])
        for chunk, owned in zip(sent, self._owned, strict=True):
            chunk[: owned.stop - owned.start] = x[owned]
        received = x.new_empty(self.group.size(), *sent.shape)
        _all_gather(received.flatten(0, 2), sent.flatten(0, 1), group=self.group)
        return torch.cat([received[rank, half, :length] for rank, half, length in self._places])

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`gather`: the sum over all ranks of [N, w] → [m, w], zero in the halo."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        sent = x.new_zeros(self.group.size(), 2, max(map(len, self._chunks)), x.shape[1], dtype=dtype)
        for (rank, half, length), part in zip(self._places, x.split([*map(len, self._chunks)]), strict=True):
            sent[rank, half, :length] = part
        received = torch.empty_like(sent[0])
        _reduce_scatter(received.flatten(0, 1), sent.flatten(0, 2), group=self.group)
        out = x.new_zeros(len(self._positions), x.shape[1])
        for chunk, owned in zip(received, self._owned, strict=True):
            out[owned] = chunk[: owned.stop - owned.start]
        return out


class _AllGatherTokens(torch.autograd.Function):
    """:meth:`ChunkPairShard.gather`, whose gradient is :meth:`ChunkPairShard.scatter`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shard: ChunkPairShard) -> torch.Tensor:
        ctx.shard = shard
        return shard.gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shard.scatter(gradients[0]), None
