"""The draft vocabulary, compared with counting by hand."""

import random
from collections import Counter

import pytest
import torch

from nemo_speculative.config.schema import VocabularySize
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import count_supervised
from nemo_speculative.data.vocab_mapping import build_vocab_mapping

TARGET_SIZE = 300


def rows(seed: int, count: int = 40) -> list[TokenRow]:
    """Zipf-like ids, half of them supervised; low ids are frequent only where they are not supervised."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        mask = [rng.random() < 0.5 for _ in range(50)]
        ids = [min(int(rng.paretovariate(0.7)), TARGET_SIZE) - 1 for _ in mask]
        ids = [TARGET_SIZE - 1 - token if inside else token for token, inside in zip(ids, mask, strict=True)]
        out.append(TokenRow(str(i), ids, mask, "here"))
    return out


def counted(data: list[TokenRow]) -> Counter:
    return Counter(t for r in data for t, inside in zip(r.input_ids, r.loss_mask, strict=True) if inside)


@pytest.mark.parametrize("size", [1, 2, 10, 64, 150, TARGET_SIZE])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_counter(size, seed):
    data = rows(seed)
    counts = counted(data)
    ranked = sorted(range(TARGET_SIZE), key=lambda token: (-counts[token], token))
    chosen = sorted(ranked[:size])

    vocabulary = build_vocab_mapping(count_supervised(data, TARGET_SIZE), VocabularySize(size))
    assert vocabulary.ids.tolist() == chosen
    assert vocabulary.size == size
    assert vocabulary.coverage == pytest.approx(sum(counts[t] for t in chosen) / counts.total())


@pytest.mark.parametrize("size", [1, 10, 150, TARGET_SIZE])
def test_d2t_is_an_offset_and_t2d_its_mask(size):
    vocabulary = build_vocab_mapping(count_supervised(rows(0), TARGET_SIZE), VocabularySize(size))
    assert (vocabulary.d2t.dtype, vocabulary.t2d.dtype) == (torch.int64, torch.bool)
    targets = [j + offset for j, offset in enumerate(vocabulary.d2t.tolist())]
    assert targets == vocabulary.ids.tolist()
    assert targets == sorted(set(targets)), "ascending, without repeats"
    assert [t for t, inside in enumerate(vocabulary.t2d.tolist()) if inside] == targets
    assert len(vocabulary.t2d) == TARGET_SIZE


def test_ties_and_ids_never_written_go_to_the_lower_id():
    data = [TokenRow("a", [9, 4, 9, 4, 7, 2], [True] * 5 + [False], "here")]
    assert build_vocab_mapping(count_supervised(data, 12), VocabularySize(1)).ids.tolist() == [4]
    assert build_vocab_mapping(count_supervised(data, 12), VocabularySize(2)).ids.tolist() == [4, 9]
    assert build_vocab_mapping(count_supervised(data, 12), VocabularySize(3)).ids.tolist() == [4, 7, 9]
    assert build_vocab_mapping(count_supervised(data, 12), VocabularySize(5)).ids.tolist() == [0, 1, 4, 7, 9]


def test_coverage_counts_supervised_tokens_only():
    data = [TokenRow("a", [1, 1, 1, 2, 2, 3], [False, False, False, True, True, True], "here")]
    vocabulary = build_vocab_mapping(count_supervised(data, 5), VocabularySize(1))
    assert vocabulary.ids.tolist() == [2]
    assert vocabulary.coverage == pytest.approx(2 / 3)


def test_the_whole_vocabulary_covers_everything():
    vocabulary = build_vocab_mapping(count_supervised(rows(0), TARGET_SIZE), VocabularySize(TARGET_SIZE))
    assert vocabulary.coverage == 1.0
    assert vocabulary.d2t.tolist() == [0] * TARGET_SIZE
    assert vocabulary.t2d.all()


@pytest.mark.parametrize("data", [[], [TokenRow("a", [1, 2], [False, False], "here")]])
def test_nothing_supervised(data):
    vocabulary = build_vocab_mapping(count_supervised(data, 10), VocabularySize(3))
    assert vocabulary.ids.tolist() == [0, 1, 2]
    assert vocabulary.coverage == 0.0
