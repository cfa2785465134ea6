"""Vocabulary pruning: the remaining ids keep their rows, and the coverage is counted."""

import json

import pytest
import torch

from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import read_servable, write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.prune_vocab import (
    coverage_table,
    most_frequent_entries,
    prune_checkpoint,
    pruned_tensors,
)
from nemo_speculative.config.schema import DataConfig, PruneJob, VocabularySize
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.vocab_mapping import build_vocab_mapping
from nemo_speculative.utils.errors import UserError

ROWS = [
    {"input_ids": [9, 20, 20, 20, 41, 41, 77], "loss_mask": [0, 1, 1, 1, 1, 1, 1]},
    {"input_ids": [5, 20], "loss_mask": [1, 1]},
]


@pytest.fixture
def checkpoint(tmp_path, target, target_dir):
    torch.manual_seed(0)
    draft = Eagle3Draft(Eagle3Shape.like_target(target.config, target.aux_layers, 100))
    draft.set_vocab_mapping(build_vocab_mapping(torch.zeros(300, dtype=torch.long), VocabularySize(100)))
    write(tmp_path / "model", draft, str(target_dir))
    return tmp_path / "model"


def write(directory, draft, target):
    provenance = Provenance(target, "0" * 16, "float32", SpeculativeSettings(3, 1, 4), 1)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    write_servable(directory, type(draft), draft.state_dict(), draft.shape, provenance, torch.float32, ids)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataConfig(path=str(tmp_path / "rows.jsonl"))


def test_the_most_frequent_ids_keep_their_rows(tmp_path, checkpoint, data):
    table = prune_checkpoint(PruneJob(str(checkpoint), str(tmp_path / "small"), 4, data))
    before, after = read_servable(checkpoint), read_servable(tmp_path / "small")
    assert after.shape.draft_vocab_size == 4
    assert after.build().draft_ids.tolist() == [5, 20, 41, 77]
    rows = before.build().draft_ids
    for j, token in enumerate([5, 20, 41, 77]):
        row = int((rows == token).nonzero())
        assert torch.equal(after.tensors["lm_head.weight"][j], before.tensors["lm_head.weight"][row])
    same = before.tensors.keys() - {"lm_head.weight", "d2t", "t2d"}
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in same)
    assert (after.provenance, after.tensors["t2d"].nonzero().flatten().tolist()) == (before.provenance, [5, 20, 41, 77])
    assert "        4   100.00%  <-" in table


def test_entries_are_chosen_by_coverage(checkpoint):
    counts = torch.zeros(300, dtype=torch.long)
    counts[:90] = torch.arange(90, 0, -1) ** 6
    servable = read_servable(checkpoint)
    entries = most_frequent_entries(servable, counts, VocabularySize(None, 0.99))
    share = counts[:100][entries].sum() / counts.sum()
    assert share >= 0.99 and len(entries) % 64 == 0


def test_the_table_counts_tokens_outside_the_draft_vocabulary(checkpoint):
    counts = torch.zeros(300, dtype=torch.long)
    counts[[10, 250]] = torch.tensor([30, 10])  # 250 is not the draft's
    table = coverage_table(read_servable(checkpoint), counts, 2)
    assert [line.split() for line in table.splitlines()[1:]] == [["2", "75.00%", "<-"], ["100", "75.00%"]]


def test_the_source_is_unchanged_and_nothing_is_overwritten(tmp_path, checkpoint, data):
    with pytest.raises(UserError, match=r"output: .* exists"):
        prune_checkpoint(PruneJob(str(checkpoint), str(checkpoint), 4, data))


@pytest.mark.parametrize(
    "size, message", [(101, "has 100 entries"), ("all", "expected a number"), (301, "larger than the target's")]
)
def test_an_impossible_size_is_refused(tmp_path, checkpoint, data, size, message):
    with pytest.raises(UserError, match=message):
        prune_checkpoint(PruneJob(str(checkpoint), str(tmp_path / "small"), size, data))
    assert not (tmp_path / "small").exists()


def test_a_draft_with_the_targets_head_cannot_be_pruned(tmp_path, target, target_dir):
    write(tmp_path / "model", EagleDraft(EagleDraft.shape_for(None, target.config)), str(target_dir))
    with pytest.raises(UserError, match="no vocabulary of its own"):
        most_frequent_entries(read_servable(tmp_path / "model"), torch.zeros(300), VocabularySize(4))


def test_logits_of_the_remaining_ids_are_unchanged(checkpoint, target):
    servable, entries = read_servable(checkpoint), torch.tensor([3, 50, 99])
    whole, state = servable.build().attach(target), pruned_tensors(servable, entries)
    small = Eagle3Draft(Eagle3Shape.like_target(target.config, target.aux_layers, 3)).attach(target)
    small.load_state_dict(state)
    hidden = torch.randn(5, target.config.hidden_size)
    torch.testing.assert_close(small.compute_logits(hidden), whole.compute_logits(hidden)[:, entries])
    assert torch.equal(small.draft_ids, whole.draft_ids[entries])
