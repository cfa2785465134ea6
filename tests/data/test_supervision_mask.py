import pytest
import torch

from nemo_speculative.algorithms.common.schedule import make_schedule
from nemo_speculative.config.schema import Eagle3DraftConfig, MaskConvention
from nemo_speculative.data.batch import collate, supervision_mask
from nemo_speculative.data.conversations import TokenRow

STEPS = 4
MASKS = ["0001111", "00111011101", "1", "01", "0011", "111", "00000", "000110001111111"]


def packed():
    rows = [TokenRow(str(n), [5] * len(m), [c == "1" for c in m], "") for n, m in enumerate(MASKS)]
    return collate([rows[:4], rows[4:], []], 32, pad_id=0)


def by_definition(mask, t, i, convention):
    """Whether slot t, step i of one document is supervised, by the definition."""
    if t + 2 + i >= len(mask):
        return False
    if convention is MaskConvention.official:
        return mask[t + i]
    if convention is MaskConvention.automodel:
        return mask[t + 1 + i]
    return all(mask[t + 1 : t + 3 + i])


@pytest.mark.parametrize("convention", list(MaskConvention))
def test_mask_follows_its_definition_document_by_document(convention):
    batch = packed()
    found = supervision_mask(batch.loss_mask, batch.documents, STEPS, convention)
    expected = torch.zeros_like(found)
    for r, masks in enumerate((MASKS[:4], MASKS[4:])):
        start = 0
        for text in masks:
            mask = [c == "1" for c in text]
            for t in range(len(mask)):
                for i in range(STEPS):
                    expected[i, r, start + t] = by_definition(mask, t, i, convention)
            start += len(mask)
    assert torch.equal(found, expected)


def test_the_first_drafted_token_of_an_answer_is_trained_and_nothing_past_its_end():
    """The answer is x_3 … x_6: the chain starts at slot 2, and the last label is x_6."""
    batch = collate([[TokenRow("", list(range(8)), [3 <= t <= 6 for t in range(8)], "")]], 8, pad_id=0)
    mask = supervision_mask(batch.loss_mask, batch.documents, STEPS, MaskConvention.serving)
    labels = {(t, t + 2 + i) for i, _, t in mask.nonzero().tolist()}
    assert labels == {(2, 4), (2, 5), (2, 6), (3, 5), (3, 6), (4, 6)}


@pytest.mark.parametrize("convention", list(MaskConvention))
def test_gathered_slots_are_those_of_the_mask(convention):
    batch = packed()
    dense = supervision_mask(batch.loss_mask, batch.documents, STEPS, convention)
    config = Eagle3DraftConfig(ttt_steps=STEPS, mask_convention=convention)
    schedule = make_schedule(batch, config, None, torch.device("cpu"))
    again, (part,) = torch.zeros_like(dense).flatten(1), schedule.chunks
    for i, s in part.supervised.nonzero().tolist():
        assert s < part.slots.active[i]
        again[i, part.slots.host_index[s]] = True
    assert torch.equal(again.view_as(dense), dense)
    assert schedule.counts.tolist() == dense.sum((1, 2)).tolist()
