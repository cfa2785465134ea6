"""The loader's order does not depend on ranks and micro-batches, and is exact after a restart."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from nemo_speculative.data.batch import Batch, PackedLoader
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import TokenizedDataset

PACKED_LENGTH = 32


def documents(count: int = 61, seed: int = 0) -> TokenizedDataset:
    rng = random.Random(seed)
    lengths = [rng.randint(3, PACKED_LENGTH) for _ in range(count)]
    rows = [
        TokenRow(f"d{i}", [rng.randrange(300) for _ in range(n)], [True] * n, "here") for i, n in enumerate(lengths)
    ]
    return TokenizedDataset(300, rows)


def stream(**options) -> PackedLoader:
    values = {"packed_length": PACKED_LENGTH, "global_batch_size": 8, "micro_batch_size": 8, "pad_id": 0, "seed": 3}
    return PackedLoader(options.pop("documents", documents()), **(values | options))


def rows_of_batches(batches: list[Batch]) -> list[tuple]:
    """Every row as plain values, in order."""
    return [
        tuple(tuple(getattr(b, key)[r].tolist()) for key in ("input_ids", "loss_mask", "positions", "documents"))
        for b in batches
        for r in range(len(b.input_ids))
    ]


def take(s: PackedLoader, batches: int) -> list[list[tuple]]:
    return [rows_of_batches(s.next_global_batch()) for _ in range(batches)]


def ids_of_epoch(s: PackedLoader) -> list[str]:
    """The documents of one epoch in the order in which they come (a global batch of one row ends with the epoch)."""
    epoch, ids = s.epoch, []
    while s.epoch == epoch:
        ids += [i for batch in s.next_global_batch() for i in batch.ids]
    return ids


BATCHES = 15  # some 35 rows an epoch in batches of 8: more than three epochs


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_a_global_batch_does_not_depend_on_the_number_of_ranks(world_size, micro_batch_size):
    whole = take(stream(), BATCHES)
    options = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    shares = [take(stream(rank=rank, **options), BATCHES) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part) for part in parts} == {8 // world_size}
        interleaved = [row for rows in zip(*parts, strict=True) for row in rows]
        assert interleaved == batch


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 8, 20])
def test_micro_batches_split_a_global_batch_in_its_order(micro_batch_size):
    s = stream(micro_batch_size=micro_batch_size)
    for expected in take(stream(), BATCHES):
        micro = s.next_global_batch()
        assert all(len(b.input_ids) <= micro_batch_size for b in micro)
        assert len(micro) == -(-8 // micro_batch_size)
        assert rows_of_batches(micro) == expected


@pytest.mark.parametrize("done", [0, 1, 4, 5, 9, 14])
def test_a_resumed_loader_gives_the_batches_of_an_uninterrupted_one(done):
    """Across epochs too, and on another number of ranks."""
    uninterrupted = take(stream(), BATCHES)
    first = stream()
    assert take(first, done) == uninterrupted[:done]
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert resumed.epoch == first.epoch
    assert take(resumed, BATCHES - done) == uninterrupted[done:]

    ranks = [stream(rank=rank, world_size=2, micro_batch_size=3) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    shares = [take(rank, BATCHES - done) for rank in ranks]
    for number, batch in enumerate(uninterrupted[done:]):
        assert shares[0][number] == batch[0::2]
        assert shares[1][number] == batch[1::2]


def test_a_loader_can_be_set_back():
    s = stream()
    expected = take(s, BATCHES)
    s.load_state_dict({"rows_consumed": 16})
    assert take(s, 3) == expected[2:5]


def test_the_state_counts_the_rows_of_all_ranks():
    s = stream(rank=1, world_size=4)
    take(s, 3)
    assert s.state_dict() == {"rows_consumed": 24}


def test_each_epoch_holds_each_document_once_in_a_different_order():
    s = stream(global_batch_size=1, micro_batch_size=1)
    epochs = [ids_of_epoch(s) for _ in range(4)]
    for ids in epochs:
        assert Counter(ids) == Counter(d.id for d in documents().rows)
    assert all(a != b for a, b in pairwise(epochs))
    assert len({tuple(ids) for ids in epochs}) == len(epochs)


def test_the_epoch_is_that_of_the_next_row():
    s = stream(global_batch_size=1, micro_batch_size=1)
    first = len(s.rows_of(0))
    assert s.epoch == 0
    take(s, first - 1)
    assert s.epoch == 0
    take(s, 1)
    assert s.epoch == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_global_batch_larger_than_an_epoch_continues_with_the_next(count):
    """Documents of a whole row each: a batch of 8 rows is 8 // count epochs and a part of another."""
    few = [TokenRow(f"d{i}", [i] * PACKED_LENGTH, [True] * PACKED_LENGTH, "here") for i in range(count)]
    batch = stream(documents=TokenizedDataset(300, few)).next_global_batch()[0]
    ids = list(batch.ids)
    for start in range(0, 8 - count + 1, count):
        assert set(ids[start : start + count]) == {d.id for d in few}


def test_the_seed_makes_the_order():
    assert take(stream(seed=4), 1) == take(stream(seed=4), 1)
    assert take(stream(seed=4), 1) != take(stream(seed=5), 1)


def test_the_padding_is_the_given_id():
    short = [TokenRow(f"d{i}", [5] * 20, [True] * 20, "here") for i in range(8)]
    batch = stream(documents=TokenizedDataset(300, short), pad_id=299).next_global_batch()[0]
    assert batch.input_ids.tolist() == [[5] * 20 + [299] * 12] * 8


def test_stopped_and_gone_on_with_at_other_rank_counts_every_document_of_an_epoch_comes_once():
    """Counted by id over three epochs and more: 1, 2, 4 and 8 ranks after each other, a restart before each."""
    seen: Counter[tuple[str, int]] = Counter()
    state = {"rows_consumed": 0}
    for world_size in (1, 2, 4, 8, 2, 1):
        ranks = [stream(rank=rank, world_size=world_size, micro_batch_size=1) for rank in range(world_size)]
        for one in ranks:
            one.load_state_dict(state)
        for _ in range(3):
            batches = [batch for one in ranks for batch in one.next_global_batch()]
            seen.update((span.id, span.epoch) for batch in batches for span in batch.spans)
        (state,) = {tuple(one.state_dict().items()) for one in ranks}
        state = dict(state)
    whole_epochs = max(epoch for _, epoch in seen)
    assert whole_epochs >= 3
    for epoch in range(whole_epochs):
        assert {i: n for (i, e), n in seen.items() if e == epoch} == {row.id: 1 for row in documents().rows}
