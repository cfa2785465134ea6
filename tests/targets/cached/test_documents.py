"""No loss reads positions that are not stored."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import supervision_mask
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.manifest import Manifest
from nemo_speculative.targets.cached.shards import document_key, stored_positions
from tests.targets.cached.cases import assert_same, batches_of, eagle1, eagle3, loss_of

CONVENTIONS = list(MaskConvention)


def read_by_hand(mask, steps, convention):
    """Positions that the slots of a document read as features and as labels, slot by slot."""
    row = mask[None]
    supervised = supervision_mask(row, torch.zeros_like(row, dtype=torch.long), steps, convention)[:, 0]
    features, labels = set(), set()
    for step, slot in itertools.product(range(steps), range(len(mask))):
        if supervised[step, slot]:
            features |= set(range(slot + 1))
            labels.add(slot + 1 + step)
    return features, labels


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.value)
def test_all_steps_read_the_positions_of_the_first(convention):
    draw, manifest = random.Random(0), SimpleNamespace(mask_convention=convention.value, last_hidden="supervised")
    for length in (1, 2, 3, 5, 12):
        for _ in range(60):
            mask = torch.tensor([draw.random() < 0.6 for _ in range(length)])
            num_aux, last_hidden = stored_positions(mask, manifest)
            for steps in (1, 2, 4, 7):
                features, labels = read_by_hand(mask, steps, convention)
                assert set(range(num_aux)) == features and set(last_hidden.tolist()) == labels


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("make", [eagle3, eagle1])
def test_losses_and_gradients_do_not_depend_on_positions_that_are_not_stored(make, convention, online_of, documents):
    algorithm = make(convention)
    target = online_of(algorithm)
    manifest = Manifest.of(target, convention, algorithm.name)
    batches = batches_of(documents, seed=3)

    def poisoned(batch, output):
        """1e4 wherever nothing is stored.  Not NaN: attention multiplies masked values by 0."""
        aux, hidden = (
            torch.full_like(output.aux_hidden_states, 1e4),
            torch.full_like(output.last_hidden_state, 1e4),
        )
        for span in batch.spans:
            place = slice(span.start, span.end)
            num_aux, last_hidden = stored_positions(batch.loss_mask[span.row, place], manifest)
            kept = last_hidden + span.start
            hidden[span.row, kept] = output.last_hidden_state[span.row, kept]
            front = slice(span.start, span.start + num_aux)
            aux[span.row, front] = output.aux_hidden_states[span.row, front]
        return TargetOutput(aux, hidden)

    assert_same(loss_of(algorithm, target, batches, poisoned), loss_of(algorithm, target, batches))


def test_labels_may_be_nan_where_nothing_is_stored(target, documents):
    algorithm, batches = eagle3(), batches_of(documents)
    manifest = Manifest.of(target, algorithm.config.mask_convention, algorithm.name)

    def poisoned(batch, output):
        hidden = torch.full_like(output.last_hidden_state, float("nan"))
        for span in batch.spans:
            place = slice(span.start, span.end)
            kept = stored_positions(batch.loss_mask[span.row, place], manifest)[1] + span.start
            hidden[span.row, kept] = output.last_hidden_state[span.row, kept]
        return TargetOutput(output.aux_hidden_states, hidden)

    assert_same(loss_of(algorithm, target, batches, poisoned), loss_of(algorithm, target, batches))


def test_a_document_key_depends_on_ids_and_mask():
    ids, mask = [5, 6, 7], [False, True, True]
    key = document_key(ids, mask)
    assert key == document_key(torch.tensor(ids), torch.tensor(mask)) and len(key) == 16
    assert (
        len(
            {key, document_key([5, 6, 8], mask), document_key(ids, [True, True, True]), document_key(ids[:2], mask[:2])}
        )
        == 4
    )
