"""Damaged shards are named and never replaced; complete ones are never lost."""

import ctypes
import errno
import mmap
import os
import re
import time

import pytest
import torch
from safetensors.torch import load_file

from nemo_speculative.targets.cached import shards
from nemo_speculative.targets.cached.manifest import ENCODINGS, FP8, Manifest
from nemo_speculative.targets.cached.shards import checksum, document_key, write_shard
from nemo_speculative.targets.cached.store import FeatureStore, merge, verify
from nemo_speculative.training.capture_features import on_all_ranks
from nemo_speculative.utils.errors import UserError, describe_error
from tests.targets.cached.cases import assert_same, batches_of, capture_into, eagle3, loss_of, make_documents, reading
from tests.training.ranks import on_ranks

HIDDEN = 8


def manifest(stored="float32", aux_layers=(1, 2)):
    return Manifest(
        target="t", dtype="float32", hidden_size=HIDDEN, aux_layers=list(aux_layers), tokenizer="", chat_template="",
        mask_convention="serving", last_hidden="supervised", stored=stored, versions={},
    )  # fmt: skip


def documents(count=5, stored="float32", first=0):
    """Documents by key, with different numbers of rows; the second has none."""
    encoded_as, made = manifest(stored), {}
    for n in range(first, first + count):
        random = torch.Generator().manual_seed(n)
        aux, hidden = (torch.randn(rows, w, generator=random) for rows, w in ((n * 3 % 7, 2 * HIDDEN), (n % 4, HIDDEN)))
        if n == 1:
            aux, hidden = aux[:0], hidden[:0]
        parts = encoded_as.encode("aux", aux) | encoded_as.encode("last_hidden", hidden)
        tensors = {name: x for name, x in parts.items() if len(x)}
        made[document_key([n], [True])] = tensors
    return made


@pytest.mark.parametrize("stored", list(ENCODINGS))
def test_documents_are_read_as_they_were_written(tmp_path, stored):
    parts = [documents(5, stored), documents(4, stored, first=5)]
    for part in parts:
        write_shard(tmp_path, part)
    store, all_of_them = FeatureStore(tmp_path, manifest(stored)), parts[1] | parts[0]
    for tensors, place in zip(all_of_them.values(), store.find(list(all_of_them)), strict=True):
        result = store.tensors(place)
        assert result.keys() == tensors.keys()
        assert all(torch.equal(result[n].view(torch.uint8), x.view(torch.uint8)) for n, x in tensors.items())
    assert store.find([b"0123456789abcdef"]) == [None] and len(store) == 9


def large_document(aux_rows, hidden_rows):
    tensors = {"aux": torch.randn(aux_rows, 2 * HIDDEN), "last_hidden": torch.randn(hidden_rows, HIDDEN)}
    return {document_key([99], [True]): tensors}


def test_a_whole_document_is_read_ahead_before_it_is_touched(tmp_path, monkeypatch):
    computed, libc = [], shards.LIBC

    class Spy:
        def madvise(self, start, length, advice):
            computed.append((start.value, start.value + length.value))
            assert advice == mmap.MADV_WILLNEED and libc.madvise(start, length, advice) == 0
            return 0

    monkeypatch.setattr(shards, "LIBC", Spy())
    monkeypatch.setattr(shards, "checksum", lambda tensors: (computed.append(None), checksum(tensors))[1])
    write_shard(tmp_path, documents(3) | large_document(5000, 900))
    computed.clear()
    result = FeatureStore(tmp_path, manifest()).tensors((0, 3))
    *before, touched = computed
    assert touched is None and max(end - start for start, end in before) == 128 * 1024
    begin, end = {start for start, _ in before}, {end for _, end in before}
    for x, start, last in zip(result.values(), sorted(begin - end), sorted(end - begin), strict=True):
        assert start <= x.data_ptr() < x.data_ptr() + x.nbytes == last


def resident(x):
    """Bytes of the pages of ``x`` that are in memory."""
    start = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = x.data_ptr() + x.nbytes - start
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    assert shards.LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def dropped(file):
    """Evicts a file from the page cache."""
    with file.open("rb+") as held:
        os.fsync(held.fileno())
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)):
        pytest.skip("this file system keeps everything in memory")


def test_a_document_larger_than_a_device_request_is_read_ahead_as_a_whole(tmp_path, monkeypatch):
    """48 MB; devices read up to 16 MB per request."""
    read = []

    def wait_and_hash(tensors):
        until = time.monotonic() + 20
        while (result := min(resident(x) / x.nbytes for x in tensors.values())) < 1 and time.monotonic() < until:
            time.sleep(0.05)
        read.append(result)
        return checksum(tensors)

    index = write_shard(tmp_path, large_document(700_000, 100))
    dropped(index.with_suffix(".safetensors"))
    monkeypatch.setattr(shards, "checksum", wait_and_hash)
    FeatureStore(tmp_path, manifest()).tensors((0, 0))
    assert len(read) == 1 and read[0] >= 1


def test_a_shard_is_a_safetensors_file(tmp_path):
    made = documents(6)
    index = write_shard(tmp_path, made)
    tensors = load_file(index.with_suffix(".safetensors"))
    for name in ("aux", "last_hidden"):
        assert torch.equal(tensors[name], torch.cat([d[name] for d in made.values() if name in d]))


def test_float8_scales_each_state_separately():
    x = torch.randn(50, 3 * HIDDEN) * torch.tensor([1e-3, 1.0, 300.0]).repeat_interleave(HIDDEN)
    x[7] = 0
    fp8 = manifest(FP8)
    back = fp8.decode("aux", fp8.encode("aux", x), torch.float32)
    of_state = x.unflatten(-1, (3, HIDDEN)).abs().amax(-1, keepdim=True)
    # e4m3 has three bits of mantissa: 1/16 of a number; near 0 2**-10 of the range of 448.
    worst = (x.abs() / 16).unflatten(-1, (3, HIDDEN)) + of_state / 448 * 2**-9
    assert ((back - x).unflatten(-1, (3, HIDDEN)).abs() <= worst + 1e-12).all() and not back[7].any()


@pytest.fixture
def features(tmp_path, target):
    return capture_into(tmp_path / "features", target, make_documents(8), eagle3())


def damage(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x40
    file.write_bytes(content)


def only(directory, pattern):
    (file,) = [f for f in directory.glob(pattern) if f.name != "manifest.json"]
    return file


def assert_rejected(features, target_dir, message):
    """Asserts that training and verification fail with one line that names the file."""

    def train():
        read = reading(target_dir, features, eagle3())
        for batch in batches_of(make_documents(8)):
            read.compute_hidden_states(batch)

    for use in (train, lambda: verify(str(features))):
        with pytest.raises(UserError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value) and "capture again" in str(refused.value)


def test_a_flipped_bit_is_found_at_the_first_read(features, target_dir):
    shard = only(features, "*.safetensors")
    damage(shard, -100)
    assert_rejected(
        features, target_dir, f"{re.escape(str(shard))} is damaged: the checksum of document [0-9a-f]+ does not match"
    )


def test_a_damaged_header_is_named(features, target_dir):
    shard = only(features, "*.safetensors")
    damage(shard, 12)
    assert_rejected(features, target_dir, re.escape(str(shard)))


def test_a_truncated_shard_is_named(features, target_dir):
    shard = only(features, "*.safetensors")
    os.truncate(shard, shard.stat().st_size - 64)
    assert_rejected(features, target_dir, f"{re.escape(str(shard))} has [0-9]+ bytes, its index says")


def test_a_shard_of_another_dtype_is_named(features, target_dir):
    shard = only(features, "*.safetensors")
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))
    assert_rejected(features, target_dir, f"{re.escape(str(shard))}: .* is torch.int32 of .*, expected torch.float32")


def test_a_missing_shard_is_named(features, target_dir):
    shard = only(features, "*.safetensors")
    shard.unlink()
    assert_rejected(features, target_dir, f"{re.escape(str(shard))} is missing")


@pytest.mark.parametrize("change", [lambda t: t[:-20], lambda t: t.replace("[0,", "[1,", 1).replace(", 0,", ", 1,", 1)])
def test_a_damaged_index_is_named(features, target_dir, change):
    index = only(features, "*.json")
    changed = change(index.read_text())
    assert changed != index.read_text()
    index.write_text(changed)
    assert_rejected(features, target_dir, f"{re.escape(str(index))}: the index is damaged")


def test_shards_removed_with_their_index_are_noticed(features, target_dir):
    for file in (only(features, "*.safetensors"), only(features, "*.json")):
        file.unlink()
    assert_rejected(features, target_dir, "holds 0 documents and its manifest.json says 8")


def test_a_damaged_manifest_is_named(features, target_dir):
    (features / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of features"):
        reading(target_dir, features, eagle3())


def test_a_capture_adds_only_missing_documents(features, target, target_dir, monkeypatch):
    documents, batches = make_documents(8), batches_of(make_documents(8), seed=4)
    more = [*documents, *make_documents(5, seed=9)]
    capture_into(features, target, more, eagle3())
    assert len(list(features.glob("*.safetensors"))) == 2
    computed = []
    monkeypatch.setattr(type(target), "compute_hidden_states", lambda self, batch: computed.append(batch))
    capture_into(features, target, more, eagle3())
    assert not computed
    monkeypatch.undo()
    assert_same(
        loss_of(eagle3(), reading(target_dir, features, eagle3()), batches), loss_of(eagle3(), target, batches), 2e-5
    )


def test_a_full_disk_ends_in_one_line_and_keeps_complete_shards(tmp_path, target, monkeypatch):
    documents, written = make_documents(60), []
    monkeypatch.setattr("nemo_speculative.training.capture_features.MIB", 1)
    whole = shards._write_safetensors

    def write(file, documents):
        whole(file, documents)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    publish = shards.write_shard
    monkeypatch.setattr(shards, "_write_safetensors", write)
    monkeypatch.setattr(
        "nemo_speculative.targets.cached.shards.write_shard", lambda *a: written.append(publish(*a)) or written[-1]
    )
    with pytest.raises(UserError, match=r"the disk is full, and [0-9a-f]+\.safetensors was not written") as refused:
        capture_into(tmp_path / "f", target, documents, eagle3(), megabytes=30_000)
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    store = FeatureStore(tmp_path / "f", Manifest.read(tmp_path / "f"))
    assert len(store.shards) == 2 and 0 < len(store) < 60
    capture_into(tmp_path / "f", target, documents, eagle3())
    assert (
        verify(str(tmp_path / "f")).endswith("every checksum is right")
        and len(FeatureStore(tmp_path / "f", store.manifest)) == 60
    )


def test_partial_files_are_ignored(features):
    (features / "0123.safetensors.77.partial").write_bytes(b"half")
    (features / "0123.json.77.partial").write_text("{")
    assert len(FeatureStore(features, Manifest.read(features))) == 8


def test_directories_are_merged_and_read_as_one(tmp_path, target, target_dir):
    documents = make_documents(12)
    parts = [capture_into(tmp_path / str(n), target, documents[n * 4 : n * 4 + 6], eagle3()) for n in range(3)]
    message = merge(list(map(str, parts)), str(tmp_path / "all"))
    assert "12 documents in 3 shards" in message
    reading(target_dir, tmp_path / "all", eagle3()).expect(documents)
    assert merge([str(parts[0])], str(tmp_path / "all")) == message
    batches = batches_of(documents)
    assert_same(
        loss_of(eagle3(), reading(target_dir, tmp_path / "all", eagle3()), batches),
        loss_of(eagle3(), target, batches),
        2e-5,
    )


def test_directories_of_another_kind_are_not_merged(tmp_path, target):
    plain = capture_into(tmp_path / "a", target, make_documents(3), eagle3())
    small = capture_into(tmp_path / "b", target, make_documents(3), eagle3(), encoding=FP8)
    with pytest.raises(UserError, match=f"stored is float32 in {tmp_path / 'c'} and fp8 here"):
        merge([str(plain), str(small)], str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"merge: .* has no manifest\.json"):
        merge([str(tmp_path / "nothing")], str(tmp_path / "d"))


def failing_on_the_second_rank():
    def work():
        if torch.distributed.get_rank():
            raise UserError("the disk is full")

    with pytest.raises(UserError) as ended:
        on_all_ranks(work)
    return describe_error(ended.value)


def test_a_rank_that_fails_ends_the_others():
    first, second = on_ranks(2, failing_on_the_second_rank)
    assert (first, second) == (
        "PeerLostError: another rank failed; its message says why",
        "UserError: the disk is full",
    )
