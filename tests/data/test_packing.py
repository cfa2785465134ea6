"""Rows of a fixed length."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from nemo_speculative.data.batch import WINDOW, collate, pack
from nemo_speculative.data.conversations import TokenRow


def log_normal_lengths(count: int, packed_length: int, seed: int = 0) -> list[int]:
    """Like ShareGPT's: a median of some 700 tokens, a long tail, cut to the row."""
    rng = random.Random(seed)
    return [min(packed_length, max(8, round(math.exp(rng.gauss(6.5, 1.0))))) for _ in range(count)]


CASES = [
    (log_normal_lengths(10_000, 2048), 2048),
    (log_normal_lengths(5_000, 4096, seed=1), 4096),
    (log_normal_lengths(WINDOW + 1, 512, seed=2), 512),
    ([7] * 100, 64),
    ([64] * 100, 64),
    ([33] * 50 + [31] * 50, 64),
    (list(range(1, 65)), 64),
    ([5], 64),
    ([], 64),
]


@pytest.mark.parametrize(("lengths", "packed_length"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_document_is_in_exactly_one_row_and_no_row_is_too_long(lengths, packed_length, seed):
    rows = pack(lengths, packed_length, seed)
    assert Counter(d for row in rows for d in row) == Counter(range(len(lengths)))
    assert all(row and sum(lengths[d] for d in row) <= packed_length for row in rows)


def test_rows_are_a_sequence_that_takes_at_most_eight_bytes_a_document():
    rows = pack(log_normal_lengths(10_000, 2048), 2048, seed=0)
    assert rows[2:5] == list(rows)[2:5] and rows[-1] == list(rows)[-1]
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert len(rows._documents.tobytes() + rows._ends.tobytes()) <= 8 * 10_000


@pytest.mark.parametrize("packed_length", [16384, 32768])
def test_long_rows_are_nearly_full(packed_length):
    """Each window of documents ends with a row that is not full: one of some 70 rows of 32k."""
    lengths = log_normal_lengths(5_000, packed_length, seed=3)
    rows = pack(lengths, packed_length, seed=0)
    assert sum(lengths) / (len(rows) * packed_length) >= 0.985


@pytest.mark.parametrize(("lengths", "packed_length"), CASES[:2])
def test_rows_are_nearly_full(lengths, packed_length):
    """97 % is what is asked for; best fit without the decreasing order would reach 98.8 and 99.2."""
    rows = pack(lengths, packed_length, seed=0)
    assert sum(lengths) / (len(rows) * packed_length) >= 0.995


def test_complementary_documents_share_rows_without_a_gap():
    assert len(pack([33] * 50 + [31] * 50, 64, seed=0)) == 50


def test_the_rows_depend_on_the_seed_and_on_nothing_else():
    lengths = log_normal_lengths(3_000, 2048)
    random.seed(1)
    first = list(pack(lengths, 2048, seed=5))
    random.seed(2)
    assert list(pack(tuple(lengths), 2048, seed=5)) == first
    assert list(pack(lengths, 2048, seed=6)) != first


def test_rows_do_not_come_by_length():
    """A row of the longest documents would otherwise open every window."""
    lengths = log_normal_lengths(2_000, 2048)
    firsts = [lengths[row[0]] for row in pack(lengths, 2048, seed=0)]
    assert firsts != sorted(firsts, reverse=True)
    halves = sum(firsts[: len(firsts) // 2]), sum(firsts[len(firsts) // 2 :])
    assert 0.9 < halves[0] / halves[1] < 1.1


def naive_collate(rows: list[list[TokenRow]], packed_length: int, pad_id: int) -> dict[str, list[list]]:
    """Token by token."""
    out: dict[str, list[list]] = {"input_ids": [], "loss_mask": [], "positions": [], "documents": []}
    for row in rows:
        cells = [
            (token, supervised, position, number)
            for number, document in enumerate(row)
            for position, (token, supervised) in enumerate(zip(document.input_ids, document.loss_mask, strict=True))
        ]
        cells += [(pad_id, False, position, len(row)) for position in range(packed_length - len(cells))]
        for key, column in zip(out, zip(*cells, strict=True), strict=True):
            out[key].append(list(column))
    return out


def documents(*lengths: int, seed: int = 0) -> list[TokenRow]:
    rng = random.Random(seed)
    return [
        TokenRow(f"d{i}", [rng.randrange(300) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)], "here")
        for i, n in enumerate(lengths)
    ]


COLLATED = [
    ([[3, 4]], 10),
    ([[10], [4, 6], [1, 1, 1]], 10),
    ([[5, 5]], 10),
    ([[1]], 1),
    ([[]], 4),
    ([[2], []], 4),
]


@pytest.mark.parametrize("pad_id", [0, 1])
@pytest.mark.parametrize(("lengths", "packed_length"), COLLATED)
def test_collate_against_a_naive_version(lengths, packed_length, pad_id):
    rows = [documents(*row, seed=r) for r, row in enumerate(lengths)]
    batch = collate(rows, packed_length, pad_id)
    for key, expected in naive_collate(rows, packed_length, pad_id).items():
        found = getattr(batch, key)
        assert found.dtype == (torch.bool if key == "loss_mask" else torch.long)
        assert found.shape == (len(rows), packed_length)
        assert found.tolist() == expected, key
    assert batch.ids == tuple(d.id for row in rows for d in row)
    assert batch.num_tokens == len(rows) * packed_length


@pytest.mark.parametrize("known", [True, False], ids=["from the spans", "from the positions"])
@pytest.mark.parametrize(("lengths", "packed_length"), COLLATED)
def test_the_lengths_of_a_batchs_documents(lengths, packed_length, known):
    """Against runs of equal document numbers, row by row; padding is a document."""
    batch = collate([documents(*row) for row in lengths], packed_length, 0)
    expected = [len(list(run)) for row in batch.documents.tolist() for _, run in groupby(row)]
    assert (batch if known else replace(batch, spans=())).document_lengths() == expected
    assert sum(expected) == batch.num_tokens


def test_the_lengths_are_known_without_reading_the_device():
    """Reading would wait for the device; a tensor on ``meta`` cannot be read."""
    batch = collate([documents(2, 3), documents(8)], 8, 0)
    assert batch.to(torch.device("meta")).document_lengths() == [2, 3, 3, 8]


def test_a_batch_moves_with_all_its_tensors():
    batch = collate([documents(2, 3)], 8, 0)
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, k).device.type for k in ("input_ids", "loss_mask", "positions", "documents")} == {"meta"}
    assert moved.ids == batch.ids
