"""Drafters, which propose draft tokens: a draft of the EAGLE family, n-grams of the text so far, or none."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.drafting import DraftCursor, DraftSession, RotaryTable, last_of
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.decoding.cached_target import States, pad_rows
from nemo_speculative.decoding.tree_builder import DynamicTree, TreeBuilder
from nemo_speculative.decoding.verify import Rejection, Trees, Verifier, chains
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError


class Drafting(ABC):
    """A drafter's state for one batch of sequences."""

    @abstractmethod
    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        """Trees of draft tokens that continue ``sequences``, of whose tokens the target has not read the last one yet.

        ``verified`` has the target's states at each sequence's positions that were verified since the last call.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps the sequences ``rows``, in this order."""


class Drafter(ABC):
    """Starts the drafting for a batch of sequences."""

    stateful: ClassVar[bool] = True
    """Whether it reads the target's states; rows can join a running batch only if not."""

    @abstractmethod
    def start(self, batch_size: int, verifier: Verifier) -> Drafting:
        """The drafting state of a new batch; raises UserError if this drafter does not support the ``verifier``."""


class StatelessDrafter(Drafter, Drafting):
    """A drafter that needs only the tokens of the sequences; its trees are on the CPU."""

    stateful = False

    def start(self, batch_size: int, verifier: Verifier) -> Drafting:
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


class EagleDrafter(Drafter):
    """A draft that reads the target's features at verified positions, then its own outputs.

    Raises:
        UserError: the draft has fewer tokens than ``tree_builder`` needs at one node.
        ValueError: the draft reads other layers than the target gives.
    """

    def __init__(self, draft: Draft, target: HFTarget, tree_builder: TreeBuilder):
        aux_layers, entries = getattr(draft.shape, "aux_layers", None), len(draft.draft_ids)
        if aux_layers is not None and aux_layers != tuple(target.aux_layers):
            raise ValueError(f"the draft reads the layers {aux_layers}, the target gives {target.aux_layers}")
        if tree_builder.max_children > entries:
            raise UserError(
                f"topk is {tree_builder.max_children}: the draft vocabulary has {entries} tokens; lower topk to "
                "that or less"
            )
        self.draft, self.tree_builder, self.table = draft.attach(target), tree_builder, RotaryTable(draft)

    def start(self, batch_size: int, verifier: Verifier) -> Drafting:
        if isinstance(verifier, Rejection) and isinstance(self.tree_builder, DynamicTree):
            raise UserError(
                "a dynamic tree (topk above 1) keeps draft tokens for their score, and then rejection sampling is not "
                "lossless: set topk=1, or leave rejection sampling off"
            )
        session = contract_of(type(self.draft)).session(self.draft, batch_size, self.table)
        return _EagleDrafting(session, self.tree_builder, verifier)


class _EagleDrafting(Drafting):
    """The drafting of an :class:`EagleDrafter` for one batch of sequences."""

    def __init__(self, session: DraftSession, tree_builder: TreeBuilder, verifier: Verifier):
        self.session, self.tree_builder, self.verifier = session, tree_builder, verifier

    def propose(self, sequences: Sequence[list[int]], verified: States) -> Trees:
        session, counts, longest = self.session, verified.counts, max(verified.counts)
        # Position t reads the feature of t and the token after it.
        starts = [start + 1 for start in session.cache.lengths]
        spans = [x[start : start + n] for x, start, n in zip(sequences, starts, counts, strict=True)]
        next_tokens = torch.tensor(pad_rows(spans, longest), device=session.table.device)
        aux, last = verified.aux_hidden_states[:, :longest], verified.last_hidden_state[:, :longest]
        feature, embeddings = session.draft.project_hidden_states(aux, last), session.draft.embed_input_ids(next_tokens)
        output = session.extend(embeddings, feature, session.table.at(session.cache.lengths, longest))
        session.cache.advance(counts)
        root = torch.tensor([tokens[-1:] for tokens in sequences], device=session.table.device)
        lengths, cursor = session.cache.lengths, DraftCursor(session, root, last_of(output, counts))
        trees = self.tree_builder.build(cursor, self.verifier)
        session.cache.set_lengths(lengths)
        return trees

    def select(self, rows: Sequence[int]) -> None:
        self.session.cache.select(rows)
