"""The benchmark's implementations of this project and of the dense reference, and helpers of the peers'."""

from contextlib import closing

import pytest
import torch
from torch import nn

from benchmarks.training_step.implementations.base import copy_weights, padded_batches
from benchmarks.training_step.registry import parse_chosen

PASSES = 3


def losses(text, setup):
    with closing(parse_chosen(text).build(setup)) as implementation:
        return [implementation.step(batch) for _ in range(PASSES) for batch in implementation.batches]


def improve(found):
    """Whether the last pass is better than the first."""
    a_pass = len(found) // PASSES
    return sum(found[-a_pass:]) < sum(found[:a_pass])


@pytest.mark.parametrize("lengths", ["full", "sharegpt"])
def test_ours_and_the_textbook_train_alike(make_setup, lengths):
    setup = make_setup(lengths=lengths)
    ours = losses("ours", setup)
    assert ours == pytest.approx(losses("textbook", setup), rel=1e-5)
    assert improve(ours)


def test_both_start_alike_in_bfloat16(make_setup):
    setup = make_setup(dtype="bfloat16")
    assert losses("ours", setup)[0] == pytest.approx(losses("textbook", setup)[0], rel=2e-2)


def test_depth_sampling_and_eagle1_run(make_setup):
    whole, sampled = (losses(text, make_setup()) for text in ("ours", "ours:geometric"))
    assert sampled != whole
    assert improve(losses("ours", make_setup(draft="eagle1", num_steps=1)))


def test_the_target_alone_has_no_loss(make_setup):
    assert losses("target", make_setup()) == [None] * PASSES


def test_padding_keeps_every_token_in_its_own_row(make_setup):
    setup = make_setup(lengths="sharegpt")
    batches = padded_batches(setup)
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    assert all(batch["input_ids"].shape[0] <= setup.case.size.rows for batch in batches)
    for (ids, attention, loss_mask), conversation in zip(rows, setup.conversations, strict=True):
        n = len(conversation)
        assert len(ids) == setup.case.size.row_tokens
        assert ids[:n].equal(conversation.input_ids) and loss_mask[:n].bool().equal(conversation.loss_mask)
        assert attention.tolist() == [1] * n + [0] * (len(ids) - n)
        assert not loss_mask[n:].any()


def test_weights_are_renamed_and_none_is_lost():
    module = nn.ModuleDict({"inner": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    weights = {"outer.weight": torch.ones(2, 2), "head.weight": torch.full((2, 2), 3.0)}
    copy_weights(module, weights, {"outer.": "inner."})
    assert module["inner"].weight.tolist() == [[1, 1]] * 2 and module["head"].weight.tolist() == [[3, 3]] * 2
    with pytest.raises(KeyError, match="elsewhere"):
        copy_weights(module, {"elsewhere.weight": torch.ones(2, 2)}, {})
