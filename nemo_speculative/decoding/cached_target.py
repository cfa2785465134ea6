"""The target during decoding: reads each prompt once, verifies trees, and keeps the accepted tokens in its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from transformers import Cache

from nemo_speculative.algorithms.common.drafting import KVCache
from nemo_speculative.decoding.verify import Trees, trees
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class States:
    """The target's hidden states for B sequences: ``counts[b]`` positions of row b, followed by arbitrary values."""

    aux_hidden_states: torch.Tensor
    """[B, n, A * h]."""
    last_hidden_state: torch.Tensor
    """[B, n, h]."""
    counts: list[int]

    def at(self, paths: Sequence[Sequence[int]]) -> "States":
        """The states at the positions ``paths`` of each row."""
        counts = [len(path) for path in paths]
        longest = max(counts)
        if all(path[-1] < n for path, n in zip(paths, counts, strict=True)):
            return States(self.aux_hidden_states[:, :longest], self.last_hidden_state[:, :longest], counts)
        index = torch.tensor(pad_rows(paths, longest), device=self.aux_hidden_states.device)
        rows = torch.arange(len(index), device=index.device)[:, None]
        return States(self.aux_hidden_states[rows, index], self.last_hidden_state[rows, index], counts)

    def select(self, rows: Sequence[int]) -> "States":
        """The states of the sequences ``rows``, in this order."""
        index = list(rows)
        return States(self.aux_hidden_states[index], self.last_hidden_state[index], [self.counts[row] for row in index])


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """The rows padded at the end to one length, with zeros that are never attended to."""
    return [[*row, *[0] * (length - len(row))] for row in rows]


class _TransformersCache(Cache):
    """A :class:`KVCache` with the interface that transformers' models write to."""

    def __init__(self, kv: KVCache) -> None:
        super().__init__(layers=[])
        self.kv = kv

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kv.append(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kv.longest

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.kv.longest + query_length, 0


class CachedTarget:
    """A target with ``kv``, the key-value cache of B sequences.

    Raises:
        UserError: the model cannot verify trees.
    """

    def __init__(self, target: HFTarget, batch_size: int):
        _check_trees(target)
        self.target, self.context = target, target.config.max_position_embeddings
        self.kv = KVCache(batch_size)
        self._cache = _TransformersCache(self.kv)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> States:
        """Reads the prompts, which may differ in length."""
        counts = [len(prompt) for prompt in prompts]
        ids = torch.tensor(pad_rows(prompts, max(counts)), device=self.target.device)
        aux, hidden = self.target.forward(ids, cache=self._cache)
        self.kv.advance(counts)
        return States(aux, hidden, counts)

    def read(self, tree: Trees) -> States:
        """The states at every node of the trees; the cache keeps those of the nodes that ``kv.keep`` names."""
        device, n = self.target.device, tree.tokens.shape[1]
        tokens, ancestors = tree.tokens.to(device), tree.ancestors
        positions = torch.tensor(self.kv.lengths, device=device)[:, None] + tree.depths.to(device)
        if self.kv.longest + tree.levels >= self.context:  # only nodes that were cut off
            positions = positions.clamp(max=self.context - 1)
        if ancestors is None and self.kv.ragged:
            ancestors = torch.ones(1, n, n, dtype=torch.bool, device=device).tril()
        visible = None if ancestors is None else self.kv.visible(ancestors)
        aux, hidden = self.target.forward(tokens, positions, self._cache, visible)
        return States(aux, hidden, [n] * len(tokens))


_CHECKED: WeakSet[HFTarget] = WeakSet()


@torch.no_grad()
def _check_trees(target: HFTarget) -> None:
    """Checks that a path of a tree gets the same states as the sequence; a model with a recurrent state, e.g., fails.

    Raises:
        UserError: it does not.
    """
    if target in _CHECKED:
        return
    _CHECKED.add(target)
    ids, path = [i % target.config.vocab_size for i in range(8)], [0, 2, 3]
    tokens, parents = (torch.tensor([x], device=target.device) for x in (ids[4:], [-1, 0, 0, 2]))
    sequence = torch.tensor([[*ids[:4], *(ids[4 + i] for i in path)]], device=target.device)
    expected = target.forward(sequence)[1][:, 4:]
    try:
        cached = CachedTarget(target, 1)
        cached.prefill([ids[:4]])
        states = cached.read(trees(tokens, parents, levels=2)).at([path]).last_hidden_state
        same = torch.allclose(states.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        same = False
    if not same:
        _CHECKED.discard(target)
        raise UserError(
            f"{target.path}: {type(target.model).__name__} gives other states for a path of a tree than for the "
            "sequence, so it cannot be decoded speculatively; its attention must take a mask and keep keys and values"
        )
