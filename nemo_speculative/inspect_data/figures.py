"""The numbers of a survey as plain values: ``figures.json``."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nemo_speculative.data.batch import pack
from nemo_speculative.data.conversations import Item, Split
from nemo_speculative.data.vocab_mapping import entries_for_coverage
from nemo_speculative.inspect_data.survey import LeftOut, Survey, Tally

SIZES = (8000, 16000, 32000)
"""Draft vocabularies in the table; for a target with fewer ids an eighth, a quarter and half of them."""
SHARES = (0.95, 0.99, 0.999)
CURVE_POINTS = 64
SMALLEST = 16
BINS_PER_DOUBLING = 2
EXAMPLES = 3


def figures(survey: Survey, split: Split, packed_length: int, seed: int) -> dict[str, Any]:
    """Every number of the report except for the comparison's.

    Args:
        packed_length: tokens in a packed row.
        seed: of the order in which documents are packed.
    """
    whole, training = survey.total(), survey.total(held_out=False)
    return {
        "conversations": whole.conversations,
        "training": training.conversations,
        "held_out": whole.conversations - training.conversations,
        "refused": left_out(survey.refused),
        "unsupervised": left_out(survey.unsupervised),
        "tokens": whole.tokens,
        "supervised_tokens": whole.supervised,
        "supervised_share": share(whole.supervised, whole.tokens),
        "coverage_histogram": [whole.coverage[bin] for bin in range(max(whole.coverage, default=-1) + 1)],
        "lengths": lengths(whole),
        "silent_answers": whole.silent,
        "turns": dict(sorted(whole.turns.items())),
        "roles": dict(whole.roles.most_common()),
        "max_length": survey.max_length,
        "truncation": truncation(whole),
        "packing": packing(training.documents, packed_length, seed),
        "vocabulary": vocabulary(survey),
        "duplicates": duplicates(survey, split),
        "sources": {name: _source(survey.total(source=name)) for name in survey.sources},
    }


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def left_out(rows: LeftOut) -> dict[str, Any]:
    return {"count": rows.count, "reasons": dict(rows.reasons.most_common()), "examples": rows.examples}


def _source(tally: Tally) -> dict[str, Any]:
    limit = list(tally.limits).index(tally.max_length)
    return {
        "conversations": tally.conversations,
        "tokens": tally.tokens,
        "supervised_share": share(tally.supervised, tally.tokens),
        "mean_length": share(tally.tokens, tally.conversations),
        "truncated": int(tally.truncated[limit]),
        "supervised_tokens_lost": int(tally.supervised_lost[limit]),
    }


def lengths(tally: Tally) -> dict[str, Any]:
    """Quantiles in tokens, and a histogram with two bins for each doubling of the length."""
    values = np.array(tally.lengths, np.int64)
    if not len(values):
        return {"histogram": []}
    bins, counts = np.unique(np.floor(BINS_PER_DOUBLING * np.log2(values)).astype(int), return_counts=True)
    counted = dict(zip(bins.tolist(), counts.tolist(), strict=True))
    edge = lambda bin: int(np.ceil(2 ** (bin / BINS_PER_DOUBLING)))  # noqa: E731
    return {
        "mean": float(values.mean()),
        "quantiles": {str(q): int(np.quantile(values, q, method="higher")) for q in (0.0, 0.5, 0.9, 0.99, 1.0)},
        "histogram": [[edge(bin), counted.get(bin, 0)] for bin in range(bins.min(), bins.max() + 1)],
    }


def truncation(tally: Tally) -> list[dict[str, Any]]:
    """The loss at each length up to the first that loses nothing, and at the configured one."""
    longest = max(tally.lengths, default=0)
    enough = next((limit for limit in tally.limits if limit >= longest), tally.limits[-1])
    columns = zip(
        tally.limits, tally.truncated, tally.tokens_lost, tally.supervised_lost, tally.left_out, strict=True
    )  # fmt: skip
    return [
        {
            "length": int(limit),
            "truncated": int(cut),
            "tokens_lost": share(lost, tally.tokens),
            "supervised_lost": share(supervised, tally.supervised),
            "left_out": int(left),
        }
        for limit, cut, lost, supervised, left in columns
        if limit <= enough or limit == tally.max_length
    ]


def packing(documents: Sequence[int], packed_length: int, seed: int) -> dict[str, Any]:
    """The share of packed rows that documents fill: as a training packs them, and in two simpler ways.

    Args:
        documents: their lengths, in tokens.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows = {
        "best fit, as in training": len(pack(documents, packed_length, seed)),
        "next fit": next_fit(order, packed_length),
        "a row each, padded": len(order),
    }
    total = sum(documents)
    ways = {way: {"rows": n, "fill": share(total, n * packed_length)} for way, n in rows.items()}
    return {"row_tokens": packed_length, "documents": len(order), "ways": ways}


def next_fit(lengths: Sequence[int], packed_length: int) -> int:
    """The number of rows if each document goes into the last one or, if it does not fit, into a new one."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, packed_length
        left -= length
    return rows


def vocabulary(survey: Survey) -> dict[str, Any]:
    """The share of supervised tokens that the most frequent ids cover, for sizes of the draft vocabulary."""
    counts = torch.from_numpy(survey.total(held_out=False).token_counts)
    size, distinct = len(counts), int((counts > 0).sum())
    if not distinct:
        return {"size": size, "distinct": 0, "curve": [], "table": [], "reach": {}}
    order = counts.sort(descending=True, stable=True).indices
    sides = {"training": counts, "held_out": torch.from_numpy(survey.total(held_out=True).token_counts)}
    by_source = {name: torch.from_numpy(survey.total(source=name).token_counts) for name in survey.sources}
    table_sizes = [n for n in SIZES if n < size] or [size // 8, size // 4, size // 2]
    sizes = np.unique(np.geomspace(min(SMALLEST, size), size, CURVE_POINTS).round().astype(int)).tolist()
    table, of_sources = (_covered(order, counted, [*table_sizes, size]) for counted in (sides, by_source))
    return {
        "size": size,
        "distinct": distinct,
        "curve": [{"entries": n} | covered for n, covered in zip(sizes, _covered(order, sides, sizes), strict=True)],
        "table": [
            {"entries": n} | covered | {"sources": by_name}
            for n, covered, by_name in zip([*table_sizes, size], table, of_sources, strict=True)
        ],
        "reach": {str(part): entries_for_coverage(counts, part) for part in SHARES},
    }


def _covered(order: torch.Tensor, counted: dict[str, torch.Tensor], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each size n the share of each side's or source's tokens among the first n ids of ``order``, [V]."""
    sums = {name: counts[order].cumsum(0) for name, counts in counted.items()}
    return [{name: share(int(c[n - 1]), int(c[-1])) for name, c in sums.items() if int(c[-1])} for n in sizes]


def duplicates(survey: Survey, split: Split) -> dict[str, Any]:
    """Rows with the same ids as an earlier one, and held-out rows that are also trained on."""
    hashes, indices = np.array(survey.hashes, np.uint64), np.array(survey.indices, np.int64)
    trained = indices < len(split.training)
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    largest = np.argsort(-sizes, kind="stable")[:EXAMPLES]
    return {
        "copies": int((sizes - 1).sum()),
        "groups": int((sizes > 1).sum()),
        "held_out_in_training": int(np.isin(hashes[~trained], hashes[trained]).sum()),
        "largest": [
            {"rows": int(sizes[g]), "ids": [_item(split, int(p)).id for p in indices[group == g][:EXAMPLES]]}
            for g in largest
            if sizes[g] > 1
        ],
    }


def _item(split: Split, index: int) -> Item:
    trained = len(split.training)
    return split.training[index] if index < trained else split.held_out[index - trained]
