"""``fill=true``: missing documents are computed once, by the target itself, and read from disk afterwards."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nemo_speculative.data.batch import collate, pack
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets.cached import shards
from nemo_speculative.targets.cached.manifest import Manifest
from nemo_speculative.targets.cached.store import Budget, FeatureStore, verify
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from tests.targets.cached.cases import ROW, assert_same, capture_into, loss_of, reading

ROUNDING = 2e-5


def epochs(documents, count):
    """The batches of each epoch, packed with another seed."""
    lengths = [len(d.input_ids) for d in documents]
    return [
        [collate([[documents[d] for d in row]], ROW, pad_id=1, epochs=[e]) for row in pack(lengths, ROW, seed=e)]
        for e in range(count)
    ]


def two_ranks(monkeypatch, target_dir, directory, algorithm, documents):
    """The targets of two ranks that fill one directory."""
    ranks = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        ranks.append(reading(target_dir, directory, algorithm, fill=True))
        ranks[-1].expect(documents)
    return ranks


@pytest.fixture
def computed(monkeypatch):
    """The batches that the target itself computed."""
    seen, compute_hidden_states = [], HFTarget.compute_hidden_states
    monkeypatch.setattr(
        HFTarget, "compute_hidden_states", lambda self, batch: seen.append(batch) or compute_hidden_states(self, batch)
    )
    return seen


def test_epochs_equal_online_training_and_the_target_runs_only_in_the_first(
    algorithm, online, documents, target_dir, tmp_path, computed
):
    first, second, third = epochs(documents, 3)
    mixed = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    mixed.expect(documents)
    result = [loss_of(algorithm, mixed, [batch]) for batch in first]
    assert len(computed) >= len(first)
    probes = len(computed)
    expected = [loss_of(algorithm, online, [batch]) for batch in first]
    for ours, theirs in zip(result, expected, strict=True):
        assert_same(ours, theirs)
    computed.clear()
    later = [loss_of(algorithm, mixed, [batch]) for batch in [*second, *third]]
    assert not computed and probes
    for ours, batch in zip(later, [*second, *third], strict=True):
        assert_same(ours, loss_of(algorithm, online, [batch]), ROUNDING)
    mixed.close()
    assert f"{len(documents)} documents" in verify(str(tmp_path / "f"))


def test_a_resumed_run_uses_the_stored_documents(algorithm, documents, target_dir, tmp_path, computed):
    (batches,) = epochs(documents, 1)
    mixed = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    mixed.expect(documents)
    for batch in batches[:2]:
        mixed.compute_hidden_states(batch)
    mixed.close()
    again = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    computed.clear()
    for batch in batches[:2]:
        again.compute_hidden_states(batch)
    assert not computed
    again.compute_hidden_states(batches[2])
    assert computed[-1] is batches[2]
    again.close()


def shared_by(two_ranks, batch):
    """Each rank with its shard of the batch; the first rank, which writes, comes last."""
    for rank in (1, 0):
        group = SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank)
        shard = ContextGroup(group).shard(batch.num_tokens, halo=3)
        yield two_ranks[rank], replace(batch, shard=shard)


def test_context_parallel_ranks_store_each_document_once_and_whole(
    algorithm, online, documents, target_dir, tmp_path, computed, monkeypatch
):
    ranks = two_ranks(monkeypatch, target_dir, tmp_path / "f", algorithm, documents)
    first, second = epochs(documents, 2)
    # Counts documents rather than files: shards of the same documents in the same order have the same name.
    written: list[bytes] = []
    keep = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda at, some: written.extend(some) or keep(at, some))
    for batch in first:
        expected = online.compute_hidden_states(batch)
        for rank, part in shared_by(ranks, batch):
            result, own = rank.compute_hidden_states(part), expected.shard(part.shard)
            assert torch.equal(result.aux_hidden_states, own.aux_hidden_states) and torch.equal(
                result.last_hidden_state, own.last_hidden_state
            )
            assert result.last_hidden_state.shape[1] < batch.num_tokens
    for rank, part in shared_by(ranks, second[0]):  # the next epoch, which the writing rank enters last
        rank.compute_hidden_states(part)
    computed.clear()
    for batch in second:
        for rank, part in shared_by(ranks, batch):
            rank.compute_hidden_states(part)
    assert not computed, "each rank found what the other wrote"
    for rank in ranks:
        rank.close()
    assert len(written) == len(set(written)) == len(documents)
    again = reading(target_dir, tmp_path / "f", algorithm)
    for batch in first:
        assert_same(loss_of(algorithm, again, [batch]), loss_of(algorithm, online, [batch]), ROUNDING)


def test_incomplete_captures_are_completed(algorithm, online, documents, target_dir, tmp_path):
    capture_into(tmp_path / "f", online, documents[:9], algorithm)
    mixed = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    for batch in epochs(documents, 1)[0]:
        mixed.compute_hidden_states(batch)
    mixed.close()
    assert "14 documents" in verify(str(tmp_path / "f"))


def test_only_one_training_at_a_time_fills_a_directory(algorithm, target_dir, tmp_path):
    first = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    with pytest.raises(UserError, match=f"backend.directory: another process writes into {tmp_path / 'f'}"):
        reading(target_dir, tmp_path / "f", algorithm, fill=True)
    first.close()
    reading(target_dir, tmp_path / "f", algorithm, fill=True).close()


def test_ranks_share_stored_documents_and_the_last_one_seals_the_directory(
    algorithm, online, documents, target_dir, tmp_path, computed, monkeypatch
):
    first, second = epochs(documents, 2)
    ranks = two_ranks(monkeypatch, target_dir, tmp_path / "f", algorithm, documents)
    for n, batch in enumerate(first):
        ranks[n % 2].compute_hidden_states(batch)
    for rank in ranks:  # each enters the next epoch, and so writes its unfinished shard
        rank.compute_hidden_states(second[0])
    computed.clear()
    for batch in second:
        for rank in ranks:
            assert_same(loss_of(algorithm, rank, [batch]), loss_of(algorithm, online, [batch]), ROUNDING)
    assert len(computed) == 2 * len(second), "each by the online one"
    for rank, message in zip(ranks, (0, len(documents)), strict=True):
        rank.close()
        assert Manifest.read(tmp_path / "f").documents == message
    assert f"{len(documents)} documents" in verify(str(tmp_path / "f"))


def test_the_directory_is_locked_until_the_last_rank_closes(algorithm, documents, target_dir, tmp_path, monkeypatch):
    ranks = two_ranks(monkeypatch, target_dir, tmp_path / "f", algorithm, documents)
    monkeypatch.setenv("RANK", "0")
    for rank in ranks:
        with pytest.raises(UserError, match=r"backend\.directory: another process writes into"):
            reading(target_dir, tmp_path / "f", algorithm, fill=True)
        with pytest.raises(UserError, match="output: another process writes into"), dir_lock(tmp_path / "f", "output"):
            pass
        rank.close()
    reading(target_dir, tmp_path / "f", algorithm, fill=True).close()


def test_a_disk_that_is_too_small_is_rejected_at_the_start(algorithm, documents, target_dir, tmp_path, monkeypatch):
    mixed = reading(target_dir, tmp_path / "f", algorithm, fill=True)
    monkeypatch.setattr("nemo_speculative.targets.cached.store.free_bytes", lambda directory: 1000)
    with pytest.raises(UserError, match=r"backend.directory: the features take .* GB free; make room"):
        mixed.expect(documents)
    mixed.close()


def test_the_budget_is_exact_to_the_byte(algorithm, online, documents, tmp_path):
    manifest = Manifest.of(online, algorithm.config.mask_convention, algorithm.name)
    (tmp_path / "f").mkdir()
    budget = Budget(FeatureStore(tmp_path / "f", manifest), documents, documents)
    capture_into(tmp_path / "f", online, documents, algorithm)
    store = FeatureStore(tmp_path / "f", Manifest.read(tmp_path / "f"))
    keys = [bytes(entry["key"]) for entry in store.shards[0].entries]
    stored = [store.tensors(place) for place in store.find(keys)]
    assert budget.nbytes == sum(x.numel() * x.element_size() for tensors in stored for x in tensors.values())
    assert Budget(store, documents).report(tmp_path / "f") == (
        f"features: all {len(documents)} documents are in {tmp_path / 'f'}; nothing is missing"
    )
    assert len(budget.missing) == len(documents) and sum(budget.lengths) == sum(len(d.input_ids) for d in documents)
