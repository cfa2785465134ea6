"""Drafters, which propose draft tokens: a draft of the EAGLE family, n-grams of the text so far, or none."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.drafting import DraftSession, RotaryTable, SessionCursor
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.decoding.cached_target import States, pad_rows
from nemo_speculative.decoding.tree_builder import TreeBuilder
from nemo_speculative.decoding.trees import Trees, chains
from nemo_speculative.decoding.verify import Verifier
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError


class Drafting(Protocol):
    """A drafter's state for one batch of sequences."""

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        """Trees of draft tokens that continue ``sequences``.

        Args:
            sequences: All tokens of each sequence; the target has not read the last one yet.
            verified: The target's states at each sequence's positions that were verified since the last call.
        """
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the sequences ``rows``, in this order."""
        ...


class Drafter(Protocol):
    """Starts the drafting for a batch of sequences."""

    def start(self, batch_size: int, verifier: Verifier) -> Drafting:
        """The drafting state of a new batch.

        Args:
            verifier: Chooses the draft tokens, and verifies them later.

        Raises:
            UserError: this drafter does not support the verifier.
        """
        ...


class StatelessDrafter:
    """A drafter that needs only the tokens of the sequences; its trees are on the CPU."""

    def start(self, batch_size: int, verifier: Verifier) -> Any:
        return self

    def select(self, rows: Sequence[int]) -> None:
        """Does nothing: there is no state."""


class NoDrafter(StatelessDrafter):
    """Plain decoding without draft tokens."""

    def propose(self, sequences: Sequence[list[int]], verified: object = None) -> Trees:
        return chains(torch.tensor([tokens[-1:] for tokens in sequences]))


class NgramDrafter(StatelessDrafter):
    """Prompt lookup: the tokens after the latest earlier occurrence of the last n tokens, for the largest n found."""

    def __init__(self, num_steps: int, max_ngram: int = 3):
        self.num_steps, self.max_ngram = num_steps, max_ngram

    def propose(self, sequences: Sequence[list[int]], verified: object = None) -> Trees:
        proposals = [self.lookup(tokens) for tokens in sequences]
        lengths = [len(proposal) for proposal in proposals]
        rows = [[tokens[-1], *proposal] for tokens, proposal in zip(sequences, proposals, strict=True)]
        return chains(torch.tensor(pad_rows(rows, max(lengths) + 1))).cut(lengths)

    def lookup(self, tokens: Sequence[int]) -> list[int]:
        """Draft tokens that continue ``tokens``; empty if no n-gram recurs."""
        for n in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            tail = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tail:
                    return list(tokens[start + n : start + n + self.num_steps])
        return []


class EagleDrafter:
    """A draft that reads the target's features at verified positions, then its own outputs.

    Raises:
        UserError: the draft has fewer tokens than ``tree_builder`` needs at one node.
        ValueError: the draft reads other layers than the target gives.
    """

    def __init__(self, draft: Draft, target: HFTarget, tree_builder: TreeBuilder):
        self.session = contract_of(type(draft)).session
        self.session.check_target(draft, target.aux_layers)
        self.draft, self.tree_builder, self.ids = draft.attach(target), tree_builder, draft.draft_ids.to(target.device)
        if tree_builder.max_children > len(self.ids):
            raise UserError(
                f"topk is {tree_builder.max_children}: the draft vocabulary has {len(self.ids)} tokens; lower topk to "
                "that or less"
            )
        self.table = RotaryTable(draft, target.device)

    def start(self, batch_size: int, verifier: Verifier) -> "_EagleDrafting":
        if verifier.samples_children and self.tree_builder.prunes_by_score:
            raise UserError(
                "a dynamic tree (topk above 1) keeps draft tokens for their score, and then rejection sampling is not "
                "lossless: set topk=1, or leave rejection sampling off"
            )
        return _EagleDrafting(self, self.session(self.draft, batch_size, self.table), verifier)


class _EagleDrafting:
    """The drafting of an :class:`EagleDrafter` for one batch of sequences."""

    def __init__(self, drafter: EagleDrafter, session: DraftSession, verifier: Verifier):
        self.drafter, self.session, self.verifier = drafter, session, verifier

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        starts, counts = self.session.cache.lengths, verified.counts
        longest = max(counts)
        # Position t reads the feature of t and the token after it.
        spans = [x[start + 1 : start + 1 + n] for x, start, n in zip(sequences, starts, counts, strict=True)]
        next_tokens = torch.tensor(pad_rows(spans, longest), device=self.session.device)
        aux, last = verified.aux_hidden_states[:, :longest], verified.last_hidden_state[:, :longest]
        output = self.session.prefill(next_tokens, aux, last, counts)
        root = torch.tensor([tokens[-1:] for tokens in sequences], device=self.session.device)
        lengths = self.session.cache.lengths
        trees = self.drafter.tree_builder.build(
            SessionCursor(self.session, root, output, self.drafter.ids), self.verifier
        )
        self.session.cache.crop(lengths)
        return trees

    def select(self, rows: Sequence[int]) -> None:
        self.session.cache.select(rows)
