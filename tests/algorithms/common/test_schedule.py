"""The schedule of a batch, against the definition of the supervised slots, pair of slot and step by pair."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nemo_speculative.algorithms.common import schedule as schedule_module
from nemo_speculative.algorithms.common.schedule import SHAPE_MULTIPLE, Slots, make_schedule
from nemo_speculative.config.schema import DepthSampling, Eagle3DraftConfig, MaskConvention, Normalization
from nemo_speculative.data.batch import collate, supervision_mask
from nemo_speculative.data.conversations import TokenRow
from tests.algorithms.cases import eagle, eagle3, lay_out, make_documents

CPU = torch.device("cpu")
STEPS = 4
LAYOUTS = {
    "several rows": [[30, 9, 50], [80], [5, 5, 5, 60], [2, 90]],
    "one row": [[40]],
    "no supervised slot": [[1, 1, 1]],
}


def packed(layout, seed=0):
    """Rows of documents of random masks."""
    random = torch.Generator().manual_seed(seed)
    rows = [
        [TokenRow(f"{r}:{n}", [5] * k, (torch.rand(k, generator=random) < 0.8).tolist(), "") for n, k in enumerate(row)]
        for r, row in enumerate(layout)
    ]
    return collate(rows, 100, pad_id=0)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def batch(request):
    return packed(request.param)


@pytest.fixture(params=[3, 128], ids=["three labels a chunk", "one chunk"])
def label_chunk(request, monkeypatch):
    monkeypatch.setattr(schedule_module, "LABEL_CHUNK", {"cpu": request.param})
    return request.param


@pytest.fixture(params=list(MaskConvention))
def convention(request):
    return request.param


@pytest.fixture
def mask(convention, batch):
    return supervision_mask(batch.loss_mask, batch.documents, STEPS, convention)


@pytest.fixture
def new_schedule(convention, monkeypatch):
    """A function that makes a schedule, with the given depths instead of sampled ones."""

    def make(batch, depths=None, normalization=Normalization.token, chunk_slots=None):
        monkeypatch.setattr(schedule_module, "geometric_depths", lambda *_: depths)
        sampling = DepthSampling.none if depths is None else DepthSampling.geometric
        config = Eagle3DraftConfig(
            ttt_steps=STEPS, mask_convention=convention, normalization=normalization, depth_sampling=sampling
        )
        return make_schedule(batch, config, 0, CPU, chunk_slots)

    return make


def some_depths(batch):
    return torch.randint(1, STEPS + 2, batch.positions.shape, generator=torch.Generator().manual_seed(1))


def expected_pairs(batch, mask, depths, normalization):
    """(flat position, step) → weight."""
    length, pairs = batch.positions.shape[1], {}
    for i, row, t in mask.nonzero().tolist():
        if depths is None or i < depths[row, t]:
            mates = int((mask[i, row] & (batch.documents[row] == batch.documents[row, t])).sum())
            pairs[row * length + t, i] = 1.0 if normalization is Normalization.token else 1 / mates
    return pairs


@pytest.mark.parametrize("normalization", list(Normalization))
@pytest.mark.parametrize("sampled", [False, True], ids=["all steps", "depths"])
@pytest.mark.parametrize("chunk_slots", [None, 64], ids=["one part", "several"])
def test_every_supervised_pair_is_one_row_with_its_weight_output_and_label(
    batch, mask, new_schedule, label_chunk, normalization, sampled, chunk_slots
):
    depths = some_depths(batch) if sampled else None
    schedule, found = new_schedule(batch, depths, normalization, chunk_slots), {}
    for rows in schedule.chunks:
        slots = rows.slots
        width, starts = len(slots.index), [0, *torch.tensor(slots.active).cumsum(0).tolist()]
        cells = torch.zeros_like(rows.supervised)
        for m in (rows.cell < rows.supervised.numel()).nonzero()[:, 0].tolist():
            i, slot = divmod(int(rows.cell[m]), width)
            t = int(slots.host_index[slot])
            assert (t, i) not in found and slot < slots.active[i]
            assert int(rows.step[m]) == i and int(rows.output[m]) == starts[i] + slot
            assert int(rows.label_positions[rows.label[m]]) == t + 1 + i
            found[t, i], cells[i, slot] = float(rows.weight[m]), True
        assert torch.equal(cells, rows.supervised)
    assert found == pytest.approx(expected_pairs(batch, mask, depths, normalization))
    everyone = expected_pairs(batch, mask, None, normalization)
    assert schedule.counts.tolist() == pytest.approx(
        [sum(w for (_, j), w in everyone.items() if j == i) for i in range(4)]
    )


@pytest.mark.parametrize("most", [64, 128])
def test_chunks_are_neighbors_of_about_equal_size_whose_windows_hold_all_that_they_read(batch, new_schedule, most):
    parts = new_schedule(batch, chunk_slots=most).chunks
    sizes = [int(part.slots.real.sum()) for part in parts]
    assert len(parts) == max(-(-sum(sizes) // most), 1) and max(sizes) <= most
    assert max(sizes) - min(sizes) < len(parts) * SHAPE_MULTIPLE
    positions, end = batch.positions.flatten(), -1
    for part in parts:
        slots = part.slots
        at = slots.host_index
        assert int(at.min()) > end
        end = int(at.max())
        assert (
            slots.key_window.start <= int((at - positions[at]).min())
            and end < slots.key_window.stop <= batch.num_tokens
        )
        assert slots.token_window.start <= int(at.min())
        assert min(end + len(slots.active), batch.num_tokens - 1) < slots.token_window.stop <= batch.num_tokens


def test_filler_has_weight_zero_and_no_cell(batch, new_schedule, label_chunk):
    (rows,) = new_schedule(batch).chunks
    filler = rows.weight == 0
    assert torch.equal(filler, rows.cell == rows.supervised.numel())
    assert int((~filler).sum()) == int(rows.supervised.sum())
    assert len(filler) % SHAPE_MULTIPLE == 0
    assert ((rows.output >= 0) & (rows.output < sum(rows.slots.active))).all()
    assert ((rows.label_positions >= 0) & (rows.label_positions < batch.num_tokens)).all()


def test_label_chunks_tile_the_rows_and_the_labels(batch, new_schedule, label_chunk):
    (rows,) = new_schedule(batch).chunks
    for axis, whole in ((0, len(rows.label)), (1, len(rows.label_positions))):
        parts = [chunk[axis] for chunk in rows.label_chunks]
        assert parts[0].start == 0 and parts[-1].stop == whole
        assert all(before.stop == after.start for before, after in pairwise(parts))
    for part, span in rows.label_chunks:
        assert (part.stop - part.start) % SHAPE_MULTIPLE == 0
        assert span.stop - span.start == label_chunk or span is rows.label_chunks[-1][1]
        assert ((rows.label[part] >= span.start) & (rows.label[part] < span.stop)).all()
    used = rows.label_positions[rows.label[rows.weight > 0].unique()]
    assert torch.equal(used, used.unique())
    assert len(rows.label_positions) - len(used) <= SHAPE_MULTIPLE


def test_depths_remove_later_steps_and_keep_the_counts(batch, new_schedule):
    depths = some_depths(batch)
    pairs = {}
    for name, given in (("all", None), ("cut", depths), ("one", torch.ones_like(depths))):
        schedule = new_schedule(batch, given)
        assert torch.equal(schedule.counts, new_schedule(batch).counts)
        (part,) = schedule.chunks
        pairs[name] = {(int(part.slots.host_index[s]), i) for i, s in part.supervised.nonzero().tolist()}
    assert pairs["cut"] == {(t, i) for t, i in pairs["all"] if i < depths.flatten()[t]}
    assert pairs["one"] == {(t, i) for t, i in pairs["all"] if i == 0}


def test_slots_are_sorted_by_their_steps_and_each_step_covers_its_own(batch, mask):
    steps = (mask.flatten(1) * torch.arange(1, STEPS + 1)[:, None]).amax(0)
    slots = Slots.of(batch.positions, steps.view_as(batch.positions), CPU)
    assert torch.equal(slots.index + slots.token_window.start, slots.host_index)
    own = slots.host_index[slots.real]
    assert torch.equal(own.sort().values, (steps > 0).nonzero()[:, 0])
    assert not len(own) or (slots.host_index[~slots.real] == own[-1]).all()
    assert torch.equal(slots.position_ids, batch.positions.flatten()[slots.host_index])
    assert all(before >= after for before, after in pairwise(slots.active))
    assert len(slots.active) == max(int(steps.max()), 1)
    for i, alive in enumerate(slots.active):
        assert alive % SHAPE_MULTIPLE == 0 and alive <= len(slots.index)
        running = slots.real & (steps[slots.host_index] > i)
        assert running[:alive].sum() == (steps > i).sum()


@pytest.mark.parametrize("case", [eagle3(9), eagle(num_steps=2, topk_w=1.0)], ids=["eagle3", "hass"])
def test_a_batch_without_supervised_slots_has_no_loss(case):
    draft, objective = case.make_draft(), case.make_objective()
    batch, supervision = lay_out([make_documents([13, 9])], 24)
    schedule = objective.schedule(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    for counts in (schedule.counts, torch.full_like(schedule.counts, 7)):  # alone, and next to other micro-batches
        draft.zero_grad()
        out = objective.loss(draft, schedule, supervision, counts)
        out.loss.backward()
        assert float(out.loss.detach()) == 0
        assert all(p.grad is not None and not p.grad.any() for p in draft.parameters())
        assert all(not x.any() for x in out.sums.values())
        assert all(value in (0, 1) for value in objective.metrics(out.sums).values())
