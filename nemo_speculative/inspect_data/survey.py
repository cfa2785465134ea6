"""One pass over the data of a training: every row is counted, and only the rows to show are stored."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.data.conversations import Conversation, Item, Split, TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

MAX_SOURCES, MAX_REASONS, MAX_EXAMPLES = 30, 20, 5
OTHERS = "(others)"
"""The name of the sources or reasons beyond the maximum."""
SHOWN = 3
NO_LIMIT = 1 << 62
LIMITS = tuple(1 << n for n in range(7, 18))
"""Lengths, in tokens, at which truncation is counted in addition to the configured one."""
COVERAGE_BINS = 20


class Tally:
    """Counts over rows, plus 8 bytes a row for its length and its trained length.

    Args:
        vocab_size: V, ids of the target.
        max_length: the length that a training truncates rows to, in tokens.
    """

    def __init__(self, vocab_size: int, max_length: int):
        self.max_length = max_length
        self.limits = np.array(sorted({*LIMITS, max_length}))
        self.tokens = self.supervised = self.silent = 0
        """``silent``: answers of one token, the end token: the template renders nothing of the message."""
        self.turns: Counter[int] = Counter()
        """Rows by their number of answers."""
        self.roles: Counter[str] = Counter()
        self.coverage: Counter[int] = Counter()
        """Rows by the supervised share of their tokens, in twentieths."""
        self.lengths = array("I")
        """Length of each row before truncation, in tokens."""
        self.documents = array("I")
        """Length of each row that is trained on, after truncation."""
        self.token_counts = np.zeros(vocab_size, np.int64)
        """[V]: supervised tokens within ``max_length``."""
        self.truncated, self.tokens_lost, self.supervised_lost, self.left_out = np.zeros(
            (4, len(self.limits)), np.int64
        )
        """For each of ``limits``: truncated rows, the tokens they lose, and rows left without a supervised token."""

    def add(self, row: TokenRow, roles: Iterable[str] | None = None) -> None:
        """
        Args:
            roles: of its messages; None for a row of token ids.
        """
        ids, mask = np.array(row.input_ids, np.int64), np.array(row.loss_mask, bool)
        length, supervised = len(ids), np.flatnonzero(mask)
        role_counts = Counter(roles or ())
        self.tokens += length
        self.supervised += len(supervised)
        self.silent += int((span_lengths(mask) == 1).sum())
        self.turns[role_counts["assistant"] if roles is not None else num_spans(mask)] += 1
        self.roles.update(role_counts)
        self.coverage[min(COVERAGE_BINS * len(supervised) // length, COVERAGE_BINS - 1)] += 1
        self.lengths.append(length)
        within = np.searchsorted(supervised, self.limits)
        self.truncated += length > self.limits
        self.tokens_lost += np.maximum(length - self.limits, 0)
        self.supervised_lost += len(supervised) - within
        self.left_out += within == 0
        trained = supervised[: np.searchsorted(supervised, self.max_length)]
        if len(trained):
            self.documents.append(min(length, self.max_length))
        token_ids, counts = np.unique(ids[trained], return_counts=True)
        self.token_counts[token_ids] += counts

    def merge(self, other: "Tally") -> None:
        """Adds the counts of ``other``, which has the same target and length."""
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
    """The number of runs of true in bool [L]."""
    return len(span_lengths(mask))


def span_lengths(mask: np.ndarray) -> np.ndarray:
    """The length of each run of true in bool [L]: int64 [spans]."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges[1::2] - edges[::2]


@dataclass
class LeftOut:
    """Rows that are not trained on: their number, reasons and examples."""

    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, reason: str = "") -> None:
        self.count += 1
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else OTHERS] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


class Survey:
    """The counts of one pass over the data, and the rows to show.

    Args:
        tokenization: a training's.
        show: ids or line numbers of the conversations to show; empty: the first three.
    """

    def __init__(self, tokenization: Tokenization, show: Sequence[str] = ()):
        self.max_length, self._show = tokenization.max_length, show
        self._tokenization = replace(tokenization, max_length=NO_LIMIT)
        self.tallies: dict[tuple[bool, str], Tally] = {}
        """Counts by (held out, source)."""
        self.refused, self.unsupervised = LeftOut(), LeftOut()
        self.shown: list[TokenRow] = []
        self.not_shown: list[str] = []
        """Ids in ``show`` that a training makes no row of."""
        self._shown_names: set[str] = set()
        self.hashes, self.indices = array("Q"), array("Q")
        """64 bits of a hash of each row's ids (two of a million rows collide with probability 1 in 37 million), and the
        row's index among all items."""

    def read(self, split: Split, callback: Callable[[Item, TokenRow | None], None]) -> None:
        """Counts every item of ``split``, held-out ones last; ``callback`` gets each with its row, which is None for a
        refused or unsupervised item.

        Raises:
            UserError: the data cannot be read, or lacks a conversation of ``show``.
        """
        total = len(split.training) + len(split.held_out)
        progress = Progress("inspecting", total)
        for index, item in enumerate(chain(split.training, split.held_out)):
            row = self._row(item)
            if row is not None:
                self._count(row, item, index, index >= len(split.training))
            self._select(item, row)
            callback(item, row)
            progress.advance()
        progress.close()
        if missing := [name for name in self._show if name not in self._shown_names]:
            raise UserError(
                f"show: no conversation among {total} has the id {missing[0]!r} or is of that line; expected ids of "
                "the data, or numbers of lines of its file"
            )

    def _row(self, item: Item) -> TokenRow | None:
        if isinstance(item, Conversation):
            chat_template_of(self._tokenization.tokenizer)  # a missing template is no fault of the conversation
        try:
            output = self._tokenization([item])
        except UserError as error:
            reason = str(error).removeprefix(f"{item.origin}: ")
            self.refused.add(f"{item.id}: {error}", reason)
            return None
        if not output.rows:
            self.unsupervised.add(item.id)
        return output.rows[0] if output.rows else None

    def _count(self, row: TokenRow, item: Item, index: int, held_out: bool) -> None:
        roles = [m["role"] for m in item.messages] if isinstance(item, Conversation) else None
        source = row.source
        if source not in self.sources and len(self.sources) >= MAX_SOURCES:
            source = OTHERS
        if (held_out, source) not in self.tallies:
            self.tallies[held_out, source] = self._empty()
        self.tallies[held_out, source].add(row, roles)
        digest = hashlib.blake2b(np.array(row.input_ids, np.int64).tobytes(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))
        self.indices.append(index)

    def _empty(self) -> Tally:
        return Tally(self._tokenization.vocab_size, self.max_length)

    def _select(self, item: Item, row: TokenRow | None) -> None:
        names = {item.id, item.origin.rpartition(":")[2]}.intersection(self._show)
        self._shown_names |= names
        if row is None:
            self.not_shown += [item.id] if names else []
        elif names or (not self._show and len(self.shown) < SHOWN):
            self.shown.append(row)

    @property
    def sources(self) -> list[str]:
        return sorted({source for _, source in self.tallies})

    def total(self, *, held_out: bool | None = None, source: str | None = None) -> Tally:
        """The counts of one side or source, or of everything."""
        total = self._empty()
        for (side, name), tally in self.tallies.items():
            if held_out in (None, side) and source in (None, name):
                total.merge(tally)
        return total
