"""The draft vocabulary stored next to the rows, compared with the counts."""

import dataclasses
import errno
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_speculative.config.schema import VocabularySize
from nemo_speculative.data import vocab_mapping
from nemo_speculative.data.tokenized_dataset import load_or_tokenize
from nemo_speculative.data.vocab_mapping import build_and_store_vocab_mapping
from nemo_speculative.utils.errors import UserError
from tests.data.test_stored_dataset import config, how, items, tokenizer  # noqa: F401

SIZE = VocabularySize(20)


@pytest.fixture
def documents(items, how, config):  # noqa: F811
    return load_or_tokenize(items, how, config, "t")


def most_frequent(documents, entries):
    counts = Counter(i for row in documents.rows for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m)
    return sorted(sorted(range(documents.vocab_size), key=lambda i: (-counts[i], i))[:entries])


def test_it_is_stored_next_to_the_rows_in_the_format_of_checkpoints(documents):
    found = build_and_store_vocab_mapping(documents, SIZE)
    (file,) = documents.directory.glob("vocabulary*")
    stored = load_file(file)
    ids = (stored["d2t"] + torch.arange(20)).tolist()
    assert file.name == "vocabulary-20.safetensors"
    assert ids == found.ids.tolist() == most_frequent(documents, 20)
    assert stored["t2d"].nonzero()[:, 0].tolist() == ids and stored["t2d"].dtype == torch.bool
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert (header["rows"], header["size"], header["entries"]) == (documents.fingerprint, "20", "20")
    assert float(header["coverage"]) == pytest.approx(found.coverage, abs=1e-6)


def test_each_size_has_a_file_of_its_own_that_follows_the_rows(documents):
    sizes = [SIZE, VocabularySize(40), VocabularySize(None, 0.9)]
    first, *_ = [build_and_store_vocab_mapping(documents, size) for size in sizes]
    names = sorted(file.name for file in documents.directory.glob("vocabulary*"))
    assert names == [f"vocabulary-{size}.safetensors" for size in ("0.9", "20", "40")]
    other = dataclasses.replace(documents, rows=documents.rows[:3])
    found = build_and_store_vocab_mapping(other, SIZE).ids.tolist()
    assert found == most_frequent(other, 20) != first.ids.tolist()
    stored = load_file(documents.directory / "vocabulary-20.safetensors")
    assert (stored["d2t"] + torch.arange(20)).tolist() == found


def test_nothing_is_stored_for_rows_in_memory_or_with_the_targets_head(documents, items, how):  # noqa: F811
    build_and_store_vocab_mapping(documents, VocabularySize(300, own_head=False))
    in_memory = build_and_store_vocab_mapping(how(list(items)), SIZE)
    assert not list(documents.directory.glob("vocabulary*"))
    assert in_memory.ids.tolist() == most_frequent(documents, 20)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_only_the_first_rank_and_run_write_it(documents, monkeypatch):
    first = build_and_store_vocab_mapping(documents, SIZE)
    monkeypatch.setattr(vocab_mapping, "atomic_write", full)
    assert torch.equal(build_and_store_vocab_mapping(documents, SIZE).ids, first.ids)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_file_is_replaced(documents, damage):
    expected = build_and_store_vocab_mapping(documents, SIZE)
    (file,) = documents.directory.glob("vocabulary*")
    file.write_bytes(damage(file.read_bytes()))
    build_and_store_vocab_mapping(documents, SIZE)
    assert torch.equal(load_file(file)["d2t"], expected.d2t)


def test_a_full_disk_is_one_line(documents, monkeypatch):
    monkeypatch.setattr(vocab_mapping, "atomic_write", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*vocabulary-20.safetensors cannot be written \(No space"):
        build_and_store_vocab_mapping(documents, SIZE)
