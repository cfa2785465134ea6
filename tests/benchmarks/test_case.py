"""The conversations of the training-step benchmark, and the input that all implementations read."""

import pytest
import torch

from benchmarks.training_step import case as cases
from benchmarks.training_step.case import SIZES, Setup, draw_conversations, sharegpt_like
from benchmarks.training_step.setup import write_setup
from nemo_speculative.data.batch import pack


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_full_rows_have_the_supervised_share(make_case, size, share):
    conversations = draw_conversations(make_case(size=size, supervised=share))
    assert [len(c) for c in conversations] == [size.row_tokens] * size.rows
    for conversation in conversations:
        mask = conversation.loss_mask.int()
        assert int(mask.sum()) == round(share * size.row_tokens)
        assert int((mask.diff() == -1).sum()) == (0 if share == 1 else 1)  # two answers, with a question between
        assert int(mask.argmax()) == pytest.approx(0.7 * (1 - share) * size.row_tokens, abs=1)


def test_sharegpt_lengths_fill_rows_as_documented(make_case, monkeypatch):
    monkeypatch.setattr(cases, "SHAREGPT_ROWS", 2000)
    case = make_case(size=SIZES["M"], lengths="sharegpt")
    row = case.size.row_tokens
    masks = [[i % 2 for i, n in enumerate(turns) for _ in range(n)][:row] for turns in sharegpt_like(case)]
    lengths = [len(mask) for mask in masks]
    assert sum(lengths) / len(lengths) / row == pytest.approx(0.59, abs=0.01)
    assert sum(lengths) / next_fit(lengths, row) / row == pytest.approx(0.79, abs=0.01)
    assert sum(map(sum, masks)) / sum(lengths) == pytest.approx(0.65, abs=0.01)
    assert sum(lengths) / len(pack(lengths, row, seed=0)) / row > 0.97


def next_fit(lengths, row):
    """Number of rows when a conversation that does not fit starts a new row."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, row
        left -= length
    return rows


def test_a_setup_is_deterministic(tmp_path, make_case):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        torch.manual_seed(hash(folder))
        write_setup(folder, make_case(lengths="sharegpt"))
    files = sorted(p.relative_to(folders[0]) for p in folders[0].rglob("*.safetensors"))
    assert len(files) >= 4  # the target is in several, which SpecForge wants
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    assert (folders[0] / "target" / "model.safetensors.index.json").exists()


def test_reading_a_setup_returns_what_was_written(tmp_path, make_case):
    case = make_case(lengths="sharegpt")
    write_setup(tmp_path, case)
    again, drawn = Setup(tmp_path), draw_conversations(case)
    assert again.case == case
    assert again.num_tokens == sum(map(len, drawn))
    for found, expected in zip(again.conversations, drawn, strict=True):
        assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.loss_mask, expected.loss_mask)
    assert again.draft_ids.tolist() == sorted(set(again.draft_ids.tolist()))
    assert again.draft_mask.nonzero().squeeze(1).equal(again.draft_ids)
    assert len(again.draft_ids) == case.size.draft_vocab_size
