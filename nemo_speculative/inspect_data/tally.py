"""What is counted of rows of tokens, in memory that does not grow with what they hold."""

from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from nemo_speculative.data.conversation import TokenRow

LIMITS = tuple(1 << n for n in range(7, 18))
"""Lengths, in tokens, at which truncation is counted beside the configured one."""
COVERAGE_BINS = 20


class Tally:
    """Counts over rows; beside them 8 bytes a row, for its length and what of it is trained on.

    Args:
        vocab_size: V, ids of the target.
        max_length: the length that a training cuts rows to, in tokens.
    """

    def __init__(self, vocab_size: int, max_length: int):
        self.max_length = max_length
        self.limits = np.array(sorted({*LIMITS, max_length}))
        self.tokens = self.supervised = self.silent = 0
        """``silent``: answers of one token, their end: of what the message holds the template renders nothing."""
        self.turns: Counter[int] = Counter()
        """Rows by their number of answers."""
        self.roles: Counter[str] = Counter()
        self.coverage: Counter[int] = Counter()
        """Rows by the twentieth in which the supervised share of their tokens lies."""
        self.lengths = array("I")
        """Of each row as it is, in tokens."""
        self.documents = array("I")
        """Of each row that is trained on, as it is cut."""
        self.token_counts = np.zeros(vocab_size, np.int64)
        """[V]: supervised tokens within ``max_length``."""
        self.truncated, self.tokens_lost, self.supervised_lost, self.left_out = np.zeros(
            (4, len(self.limits)), np.int64
        )
        """For each of ``limits``: rows that are cut, what they lose, and rows left without a supervised token."""

    def add(self, row: TokenRow, roles: Iterable[str] | None = None) -> None:
        """
        Args:
            roles: of its messages; None where it came as tokens.
        """
        ids, mask = np.array(row.input_ids, np.int64), np.array(row.loss_mask, bool)
        length, places = len(ids), np.flatnonzero(mask)
        spoken = Counter(roles or ())
        self.tokens += length
        self.supervised += len(places)
        self.silent += int((span_lengths(mask) == 1).sum())
        self.turns[spoken["assistant"] if roles is not None else num_spans(mask)] += 1
        self.roles.update(spoken)
        self.coverage[min(COVERAGE_BINS * len(places) // length, COVERAGE_BINS - 1)] += 1
        self.lengths.append(length)
        within = np.searchsorted(places, self.limits)
        self.truncated += length > self.limits
        self.tokens_lost += np.maximum(length - self.limits, 0)
        self.supervised_lost += len(places) - within
        self.left_out += within == 0
        trained = places[: np.searchsorted(places, self.max_length)]
        if len(trained):
            self.documents.append(min(length, self.max_length))
        seen, times = np.unique(ids[trained], return_counts=True)
        self.token_counts[seen] += times

    def absorb(self, other: "Tally") -> None:
        """Adds what ``other``, of the same target and length, has counted."""
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.silent += other.silent
        for name in ("turns", "roles", "coverage"):
            getattr(self, name).update(getattr(other, name))
        for name in ("lengths", "documents"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("token_counts", "truncated", "tokens_lost", "supervised_lost", "left_out"):
            getattr(self, name).__iadd__(getattr(other, name))

    @property
    def conversations(self) -> int:
        return len(self.lengths)


def num_spans(mask: np.ndarray) -> int:
    """Runs of true in bool [L]."""
    return len(span_lengths(mask))


def span_lengths(mask: np.ndarray) -> np.ndarray:
    """int64 [spans]: how long each run of true in bool [L] is."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges[1::2] - edges[::2]
