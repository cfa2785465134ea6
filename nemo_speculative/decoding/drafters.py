"""Who proposes draft tokens: a draft of the EAGLE family, n-grams of the text so far, or nobody."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.kv_cache import KVCache
from nemo_speculative.decoding.cached_target import States, last_of, pad_rows
from nemo_speculative.decoding.tree_builder import TreeBuilder
from nemo_speculative.decoding.trees import Trees, chains
from nemo_speculative.decoding.verify import Verifier
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError

FIRST_POSITIONS = 512


class Drafting(Protocol):
    """The drafting for one batch of sequences."""

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        """Trees behind ``sequences``.

        Args:
            sequences: each whole; the target has not read its last token.
            verified: the target's states at the positions of each that were verified since the last call.
        """
        ...

    def select(self, rows: Sequence[int]) -> None:
        """The other sequences are done."""
        ...


class Drafter(Protocol):
    """Starts the drafting for a batch of sequences."""

    def start(self, batch_size: int, verifier: Verifier) -> Drafting:
        """``verifier`` says how draft tokens are chosen: the one that verifies them.

        Raises:
            UserError: this drafter cannot draft for it.
        """
        ...


class _Stateless:
    """Drafts from the sequences alone, which are given whole each time."""

    def start(self, batch_size: int, verifier: Verifier) -> Any:
        return self

    def select(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""


class NoDrafter(_Stateless):
    """Plain decoding."""

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        return chains(torch.tensor([tokens[-1:] for tokens in sequences], device=verified.aux_hidden_states.device))


class NgramDrafter(_Stateless):
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens, for the largest n found."""

    def __init__(self, num_steps: int, max_ngram: int = 3):
        self.num_steps, self.max_ngram = num_steps, max_ngram

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        found = [self.lookup(tokens) for tokens in sequences]
        lengths = [len(x) for x in found]
        rows = [[tokens[-1], *x] for tokens, x in zip(sequences, found, strict=True)]
        return chains(torch.tensor(pad_rows(rows, max(lengths) + 1), device=verified.aux_hidden_states.device)).cut(
            lengths
        )

    def lookup(self, tokens: Sequence[int]) -> list[int]:
        """Draft tokens behind ``tokens``; none where nothing recurs."""
        for n in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            tail = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tail:
                    return list(tokens[start + n : start + n + self.num_steps])
        return []


class EagleDrafter:
    """A draft that reads the target's features where there are some, then its own outputs.

    Raises:
        UserError: the draft has fewer tokens than ``tree_builder`` asks for at one node.
        ValueError: the draft reads other layers than the target gives.
    """

    def __init__(self, draft: Draft, target: HFTarget, tree_builder: TreeBuilder):
        wanted = getattr(draft.shape, "aux_layers", None)
        if wanted is not None and wanted != tuple(target.aux_layers):
            raise ValueError(f"the draft reads the layers {wanted}, the target gives {target.aux_layers}")
        self.draft, self.tree_builder, self.ids = draft.attach(target), tree_builder, draft.draft_ids.to(target.device)
        if tree_builder.max_children > len(self.ids):
            raise UserError(
                f"topk is {tree_builder.max_children}: the draft vocabulary has {len(self.ids)} tokens; lower topk to "
                "that or less"
            )
        self.device = target.device
        self._table = self._rotations(FIRST_POSITIONS)

    def start(self, batch_size: int, verifier: Verifier) -> "_EagleDrafting":
        if verifier.samples_children and self.tree_builder.prunes_by_score:
            raise UserError(
                "a dynamic tree (topk above 1) keeps draft tokens for their score, and then rejection sampling is not "
                "lossless: set topk=1, or leave rejection sampling off"
            )
        return _EagleDrafting(self, batch_size, verifier)

    def rotation(self, starts: Sequence[int], n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B or 1, 1, n, d] of the n positions from ``starts[b]`` on.

        From a table: computing them anew would cost as much as the rest of a draft step.
        """
        end = max(starts) + n
        if end > self._table[0].shape[2]:
            self._table = self._rotations(2 * end)
        cos, sin = self._table
        if min(starts) == max(starts):
            return cos[:, :, end - n : end], sin[:, :, end - n : end]
        at = torch.tensor(starts, device=self.device)[:, None] + torch.arange(n, device=self.device)
        return cos[0, 0, at][:, None], sin[0, 0, at][:, None]

    def _rotations(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.draft.rotary(torch.arange(length, device=self.device)[None], self.draft.dtype)


class _EagleDrafting:
    """See :class:`EagleDrafter`: one batch of sequences, and the draft's cache of them."""

    def __init__(self, drafter: EagleDrafter, batch_size: int, verifier: Verifier):
        self.drafter, self.draft, self.verifier, self.cache = drafter, drafter.draft, verifier, KVCache(batch_size)

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        output = self._read(sequences, verified)
        root = torch.tensor([tokens[-1:] for tokens in sequences], device=self.drafter.device)
        lengths = self.cache.lengths
        trees = self.drafter.tree_builder.build(_EagleCursor(self, root, output), self.verifier)
        self.cache.crop(lengths)
        return trees

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)

    def _read(self, sequences: Sequence[list[int]], verified: States) -> torch.Tensor:
        """Output [B, 1, h] at the last verified position; position t reads the feature of t and the token after it."""
        starts, counts = self.cache.lengths, verified.counts
        longest = max(counts)
        spans = [x[start + 1 : start + 1 + n] for x, start, n in zip(sequences, starts, counts, strict=True)]
        tokens = torch.tensor(pad_rows(spans, longest), device=self.drafter.device)
        feature = self.draft.read(verified.aux_hidden_states[:, :longest], verified.last_hidden_state[:, :longest])
        visible = None
        if self.cache.ragged:
            visible = self.cache.visible(feature.new_ones(1, longest, longest, dtype=torch.bool).tril())
        rotation = self.drafter.rotation(starts, longest)
        output = self.draft.extend(self.draft.embed(tokens), feature, rotation, self.cache, visible)
        self.cache.advance(counts)
        return last_of(output, counts)


class _EagleCursor:
    """See :class:`.tree_builder.DraftCursor`; the levels lie in the cache behind the sequences."""

    def __init__(self, drafting: _EagleDrafting, root: torch.Tensor, output: torch.Tensor):
        self.draft, self.cache, self.rotation = drafting.draft, drafting.cache, drafting.drafter.rotation
        self.root, self.ids, self._output = root, drafting.drafter.ids, output
        self._position = list(drafting.cache.lengths)
        self._ancestors: torch.Tensor | None = None
        """bool [B or 1, w, s]: what each node sees of the s nodes so far; None: chains, or none yet."""

    @property
    def logits(self) -> torch.Tensor:
        return self.draft.logits(self._output)

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        feature = self.draft.feed_back(self._output)
        visible = None
        if parents is not None:
            wide = parents.expand(len(tokens), -1)[..., None]
            feature = feature.gather(1, wide.expand(-1, -1, feature.shape[-1]))
            visible = self.cache.visible(self._see(parents))
        elif self.cache.ragged:
            visible = self.cache.visible(tokens.new_ones(1, 1, 1, dtype=torch.bool))
        rotation = self.rotation(self._position, 1)
        self._output = self.draft.extend(self.draft.embed(tokens), feature, rotation, self.cache, visible)
        self.cache.advance(tokens.shape[1])
        self._position = [position + 1 for position in self._position]

    def _see(self, parents: torch.Tensor) -> torch.Tensor:
        """Ancestors of the next level: its parents', and itself."""
        itself = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
        if self._ancestors is None:
            self._ancestors = itself
        else:
            above = parents[..., None].expand(-1, -1, self._ancestors.shape[-1])
            self._ancestors = torch.cat((self._ancestors.expand(len(parents), -1, -1).gather(1, above), itself), -1)
        return self._ancestors
