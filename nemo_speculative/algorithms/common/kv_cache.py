"""Keys and values of several sequences of different lengths, compacted after a tree was verified."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

FIRST_CAPACITY = 64


class KVCache:
    """The cache of a model's layers for B sequences.

    Positions past a row's length are scratch: ``append`` writes there, ``advance`` or ``keep`` makes them count, the
    next ``append`` overwrites the others.
    """

    def __init__(self, batch_size: int = 1) -> None:
        self._layers: dict[int, list[torch.Tensor]] = {}
        self._set([0] * batch_size)

    def _set(self, lengths: list[int]) -> None:
        self.lengths = lengths
        """Positions of each row that count."""
        self.longest = max(lengths, default=0)
        self.ragged = min(lengths, default=0) < self.longest
        """Whether the rows differ in length; only then does causal attention need a mask."""
        self._positions: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes n positions after each row's length.

        Args:
            key, value: [B, H_kv, n, d].

        Returns:
            Keys and values [B, H_kv, m, d] with m = the longest row's length + n; a shorter row's last positions hold
            whatever was there.
        """
        new = key.shape[2]
        end = self.longest + new
        keys, values = self._storage(layer, (key, value), end)
        if self.ragged:
            rows, at = self._next_positions(new, key.device)
            keys[rows, :, at] = key.transpose(1, 2)
            values[rows, :, at] = value.transpose(1, 2)
        else:
            keys.narrow(2, self.longest, new).copy_(key)
            values.narrow(2, self.longest, new).copy_(value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def visible(self, ancestors: torch.Tensor) -> torch.Tensor:
        """The positions, of the m that ``append`` will return, that the next n of each row see: bool [B or 1, n, m].

        Args:
            ancestors: bool [B or 1, n, s], which of the newest s positions of its row each sees, the next n last; it
                sees all before them.
        """
        new, span = ancestors.shape[1:]
        if not self.ragged:
            before = ancestors.new_ones(()).expand(len(ancestors), new, self.longest + new - span)
            return torch.cat((before, ancestors), dim=-1)
        starts = torch.tensor(self.lengths, device=ancestors.device)[:, None] + (new - span)
        offset = torch.arange(self.longest + new, device=ancestors.device) - starts
        place = offset.clamp(0, span - 1)[:, None].expand(-1, new, -1)
        within = ancestors.expand(len(self.lengths), -1, -1).gather(2, place) & (offset < span)[:, None]
        return (offset < 0)[:, None] | within

    def advance(self, counts: Sequence[int] | int) -> None:
        """The first ``counts`` scratch positions of each row count from now on."""
        many = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self._set([length + n for length, n in zip(self.lengths, many, strict=True)])

    def crop(self, lengths: Sequence[int]) -> None:
        """Cuts every row back to ``lengths``."""
        self._set(list(lengths))

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """The scratch positions ``paths`` of each row, ascending, move to its end and count."""
        if any(path[-1] >= len(path) for path in paths):
            self._compact(paths)
        self.advance([len(path) for path in paths])

    def _compact(self, paths: Sequence[Sequence[int]]) -> None:
        longest = max(len(path) for path in paths)
        # A shorter path is padded with positions that stay where they are.
        whole = torch.tensor([[*path, *range(len(path), longest)] for path in paths])
        for stored in self._layers.values():
            rows, to = self._next_positions(longest, stored[0].device)
            source = to[:, :1] + whole.to(to.device)
            for tensor in stored:
                tensor[rows, :, to] = tensor[rows, :, source]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the sequences ``rows``, in this order."""
        index = list(rows)
        self._layers = {layer: [tensor[index] for tensor in stored] for layer, stored in self._layers.items()}
        self._set([self.lengths[row] for row in index])

    def join(self, other: "KVCache") -> None:
        """Appends the sequences of ``other`` to those of this cache."""
        for layer, others in other._layers.items():
            both = zip(self._layers[layer], others, strict=True)
            self._layers[layer] = [torch.cat(_pad_to_equal(x, y)) for x, y in both]
        self._set(self.lengths + other.lengths)

    def _next_positions(self, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row [B, 1] and position [B, n] of the ``new`` positions after each row's length."""
        if (new, device) not in self._positions:
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            at = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(new, device=device)
            self._positions[new, device] = rows, at
        return self._positions[new, device]

    def _storage(self, layer: int, like: tuple[torch.Tensor, torch.Tensor], needed: int) -> list[torch.Tensor]:
        stored = self._layers.get(layer)
        if stored is None or stored[0].shape[2] < needed:
            capacity = stored[0].shape[2] if stored else FIRST_CAPACITY
            while capacity < needed:
                capacity *= 2
            # Zeros: masked positions are still multiplied, and 0 * NaN is NaN.
            grown = [x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in like]
            for new, old in zip(grown, stored or [], strict=False):
                new[:, :, : old.shape[2]] = old
            self._layers[layer] = stored = grown
        return stored


def _pad_to_equal(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, m, d] each, the shorter one padded with zeros."""
    length = max(x.shape[2], y.shape[2])
    return pad(x, (0, 0, 0, length - x.shape[2])), pad(y, (0, 0, 0, length - y.shape[2]))
