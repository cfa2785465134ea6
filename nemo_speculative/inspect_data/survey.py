"""One pass over the data of a training, and its numbers as plain values: ``figures.json``.

Every row is counted, and only the rows to show are stored.
"""

import hashlib
import math
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from nemo_speculative.data.batch import pack
from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.data.conversations import Conversation, Item, Split, TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.data.vocab_mapping import entries_for_coverage
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
SIZES = (8000, 16000, 32000)
"""Draft vocabularies in the table; for a target with fewer ids an eighth, a quarter and half of them."""
SHARES = (0.95, 0.99, 0.999)
CURVE_POINTS = 64
SMALLEST = 16
BINS_PER_DOUBLING = 2
EXAMPLES = 3


class Tally:
    """Counts over rows, plus 8 bytes a row for its length and its trained length: at most ``max_length`` tokens."""

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
        """[V]: supervised tokens within ``max_length``, by id."""
        self.truncated, self.tokens_lost, self.supervised_lost, self.left_out = np.zeros(
            (4, len(self.limits)), np.int64
        )
        """For each of ``limits``: truncated rows, the tokens they lose, and rows left without a supervised token."""

    def add(self, row: TokenRow, roles: Iterable[str] | None = None) -> None:
        """Counts ``row``; ``roles``: of its messages, None for a row of token ids."""
        ids, mask = np.array(row.input_ids, np.int64), np.array(row.loss_mask, bool)
        length, supervised, spans = len(ids), np.flatnonzero(mask), span_lengths(mask)
        role_counts = Counter(roles or ())
        self.tokens += length
        self.supervised += len(supervised)
        self.silent += int((spans == 1).sum())
        self.turns[role_counts["assistant"] if roles is not None else len(spans)] += 1
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
        for name in vars(self).keys() - {"max_length", "limits"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def conversations(self) -> int:
        return len(self.lengths)


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

    ``show``: ids or line numbers of the conversations to show; empty: the first three.
    """

    def __init__(self, tokenization: Tokenization, show: Sequence[str] = ()):
        self.max_length, self._show = tokenization.max_length, show
        self._tokenization = replace(tokenization, max_length=NO_LIMIT)
        self.tallies: dict[tuple[bool, str], Tally] = defaultdict(self._empty)
        """Counts by (held out, source)."""
        self.refused, self.unsupervised = LeftOut(), LeftOut()
        self.shown: list[TokenRow] = []
        self.not_shown: list[str] = []
        """Ids in ``show`` that a training makes no row of."""
        self.hashes, self.indices = array("Q"), array("Q")
        """64 bits of a hash of each row's ids (two of a million rows collide with probability 1 in 37 million), and the
        row's index among all items."""

    def read(self, split: Split, callback: Callable[[Item, TokenRow | None], None]) -> None:
        """Counts every item of ``split``, held-out ones last; raises UserError if one of ``show`` is missing.

        ``callback`` gets each item with its row, which is None for a refused or unsupervised one.
        """
        total, missing = len(split.training) + len(split.held_out), dict.fromkeys(self._show)
        progress = Progress("inspecting", total)
        for index, item in enumerate(chain(split.training, split.held_out)):
            row = self._row(item)
            if row is not None:
                self._count(row, item, index, index >= len(split.training))
            names = {item.id, item.origin.rpartition(":")[2]}.intersection(self._show)
            for name in names:
                missing.pop(name, None)
            if row is None:
                self.not_shown += [item.id] if names else []
            elif names or (not self._show and len(self.shown) < SHOWN):
                self.shown.append(row)
            callback(item, row)
            progress.advance()
        progress.close()
        if missing:
            raise UserError(
                f"show: no conversation among {total} has the id {next(iter(missing))!r} or is of that line; expected "
                "ids of the data, or numbers of lines of its file"
            )

    def _row(self, item: Item) -> TokenRow | None:
        if isinstance(item, Conversation):
            chat_template_of(self._tokenization.tokenizer)  # a missing template is no fault of the conversation
        try:
            rows = self._tokenization([item]).rows
        except UserError as error:
            self.refused.add(f"{item.id}: {error}", str(error).removeprefix(f"{item.origin}: "))
            return None
        if not rows:
            self.unsupervised.add(item.id)
        return rows[0] if rows else None

    def _count(self, row: TokenRow, item: Item, index: int, held_out: bool) -> None:
        roles = [m["role"] for m in item.messages] if isinstance(item, Conversation) else None
        source = row.source if row.source in self.sources or len(self.sources) < MAX_SOURCES else OTHERS
        self.tallies[held_out, source].add(row, roles)
        digest = hashlib.blake2b(np.array(row.input_ids, np.int64).tobytes(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))
        self.indices.append(index)

    def _empty(self) -> Tally:
        return Tally(self._tokenization.vocab_size, self.max_length)

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


def figures(survey: Survey, split: Split, packed_length: int, seed: int) -> dict[str, Any]:
    """Every number of the report except for the comparison's; ``seed``: of the order in which documents are packed."""
    whole, training = survey.total(), survey.total(held_out=False)
    return {
        "conversations": whole.conversations,
        "training": training.conversations,
        "held_out": whole.conversations - training.conversations,
        "refused": _left_out(survey.refused),
        "unsupervised": _left_out(survey.unsupervised),
        "tokens": whole.tokens,
        "supervised_tokens": whole.supervised,
        "supervised_share": _share(whole.supervised, whole.tokens),
        "coverage_histogram": [whole.coverage[bin] for bin in range(max(whole.coverage, default=-1) + 1)],
        "lengths": lengths(whole),
        "silent_answers": whole.silent,
        "turns": dict(sorted(whole.turns.items())),
        "roles": dict(whole.roles.most_common()),
        "max_length": survey.max_length,
        "truncation": _truncation(whole),
        "packing": _packing(training.documents, packed_length, seed),
        "vocabulary": _vocabulary(survey),
        "duplicates": _duplicates(survey, split),
        "sources": {name: _source(survey.total(source=name)) for name in survey.sources},
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _left_out(rows: LeftOut) -> dict[str, Any]:
    return {"count": rows.count, "reasons": dict(rows.reasons.most_common()), "examples": rows.examples}


def _source(tally: Tally) -> dict[str, Any]:
    limit = list(tally.limits).index(tally.max_length)
    return {
        "conversations": tally.conversations,
        "tokens": tally.tokens,
        "supervised_share": _share(tally.supervised, tally.tokens),
        "mean_length": _share(tally.tokens, tally.conversations),
        "truncated": int(tally.truncated[limit]),
        "supervised_tokens_lost": int(tally.supervised_lost[limit]),
    }


def lengths(tally: Tally) -> dict[str, Any]:
    """Quantiles in tokens, and a histogram with two bins for each doubling of the length."""
    values = np.array(tally.lengths, np.int64)
    if not len(values):
        return {"histogram": []}
    bins = np.floor(BINS_PER_DOUBLING * np.log2(values)).astype(int)
    counts = enumerate(np.bincount(bins - bins.min()).tolist(), start=int(bins.min()))
    return {
        "mean": float(values.mean()),
        "quantiles": {str(q): int(np.quantile(values, q, method="higher")) for q in (0.0, 0.5, 0.9, 0.99, 1.0)},
        "histogram": [[math.ceil(2 ** (bin / BINS_PER_DOUBLING)), count] for bin, count in counts],
    }


def _truncation(tally: Tally) -> list[dict[str, Any]]:
    """The loss at each length up to the first that loses nothing, and at the configured one."""
    longest = max(tally.lengths, default=0)
    enough = next((limit for limit in tally.limits if limit >= longest), tally.limits[-1])
    return [
        {
            "length": int(limit),
            "truncated": int(tally.truncated[n]),
            "tokens_lost": _share(int(tally.tokens_lost[n]), tally.tokens),
            "supervised_lost": _share(int(tally.supervised_lost[n]), tally.supervised),
            "left_out": int(tally.left_out[n]),
        }
        for n, limit in enumerate(tally.limits)
        if limit <= enough or limit == tally.max_length
    ]


def _packing(documents: Sequence[int], packed_length: int, seed: int) -> dict[str, Any]:
    """The share of packed rows that documents of these lengths fill: as a training packs them, and in two others."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows = {
        "best fit, as in training": len(pack(documents, packed_length, seed)),
        "next fit": next_fit(order, packed_length),
        "a row each, padded": len(order),
    }
    ways = {way: {"rows": n, "fill": _share(sum(documents), n * packed_length)} for way, n in rows.items()}
    return {"row_tokens": packed_length, "documents": len(order), "ways": ways}


def next_fit(lengths: Sequence[int], packed_length: int) -> int:
    """The number of rows if each document goes into the last one or, if it does not fit, into a new one."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, packed_length
        left -= length
    return rows


def _vocabulary(survey: Survey) -> dict[str, Any]:
    """The share of supervised tokens that the most frequent ids cover, for sizes of the draft vocabulary."""
    counts = torch.from_numpy(survey.total(held_out=False).token_counts)
    size, distinct = len(counts), int((counts > 0).sum())
    if not distinct:
        return {"size": size, "distinct": 0, "curve": [], "table": [], "reach": {}}
    order = counts.sort(descending=True, stable=True).indices
    sides = {"training": counts, "held_out": torch.from_numpy(survey.total(held_out=True).token_counts)}
    by_source = {name: torch.from_numpy(survey.total(source=name).token_counts) for name in survey.sources}
    table_sizes = [*([n for n in SIZES if n < size] or [size // 8, size // 4, size // 2]), size]
    curve_sizes = np.unique(np.geomspace(min(SMALLEST, size), size, CURVE_POINTS).round().astype(int)).tolist()
    table = [
        {"entries": n} | covered | {"sources": sources}
        for n, covered, sources in zip(
            table_sizes, _covered(order, sides, table_sizes), _covered(order, by_source, table_sizes), strict=True
        )
    ]
    curve = zip(curve_sizes, _covered(order, sides, curve_sizes), strict=True)
    reach = {str(part): entries_for_coverage(counts, part) for part in SHARES}
    return {"size": size, "distinct": distinct, "curve": [{"entries": n} | covered for n, covered in curve],
            "table": table, "reach": reach}  # fmt: skip


def _covered(order: torch.Tensor, counted: dict[str, torch.Tensor], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each size n the share of each side's or source's tokens among the first n ids of ``order``, [V]."""
    sums = {name: counts[order].cumsum(0) for name, counts in counted.items()}
    return [{name: int(c[n - 1]) / int(c[-1]) for name, c in sums.items() if int(c[-1])} for n in sizes]


def _duplicates(survey: Survey, split: Split) -> dict[str, Any]:
    """Rows with the same ids as an earlier one, and held-out rows that are also trained on."""
    hashes, indices = np.array(survey.hashes, np.uint64), np.array(survey.indices, np.int64)
    num_training = len(split.training)
    trained = indices < num_training
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)

    def id_of(index: int) -> str:
        return (split.training[index] if index < num_training else split.held_out[index - num_training]).id

    return {
        "copies": int((sizes - 1).sum()),
        "groups": int((sizes > 1).sum()),
        "held_out_in_training": int(np.isin(hashes[~trained], hashes[trained]).sum()),
        "largest": [
            {"rows": int(sizes[g]), "ids": [id_of(index) for index in indices[group == g][:EXAMPLES].tolist()]}
            for g in np.argsort(-sizes, kind="stable")[:EXAMPLES]
            if sizes[g] > 1
        ],
    }
