"""What a training step computes of a batch: slots, steps and labels, known before any model runs.

Made on the host, ahead of the step, so that nothing in the step has to wait for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from nemo_speculative.algorithms.common.slots import Layout, Slots, round_up
from nemo_speculative.config.schema import Normalization
from nemo_speculative.data.batch import Batch
from nemo_speculative.utils.devices import send

LABEL_CHUNK = {"cpu": 128, "cuda": 512}
"""Positions whose target logits [P, V] are alive at once."""
LABEL_MULTIPLE = 16
"""Their number is rounded up to it: less than other shapes, as every one of them costs V products."""


@dataclass(frozen=True)
class Rows:
    """The (slot, step) pairs that carry a loss, as M rows in ascending order of their label.

    Labels come in chunks of equal size, and each chunk's rows are rounded up with rows that weigh nothing.
    """

    output: torch.Tensor
    """int64 [M]: which row of the steps' outputs, laid end to end."""
    step: torch.Tensor
    """int64 [M]"""
    cell: torch.Tensor
    """int64 [M]: step * N + slot; T * N for filler."""
    weight: torch.Tensor
    """float32 [M]; 0 for filler."""
    label: torch.Tensor
    """int64 [M]: which of ``labels``."""
    labels: torch.Tensor
    """int64 [P], ascending: positions in the share whose target output is a label; the last chunk is rounded up."""
    chunks: tuple[tuple[slice, slice], ...]
    """Which rows have their labels in which part of ``labels``."""


@dataclass(frozen=True)
class Part:
    """Neighbouring slots, of which a loss and its gradient are taken before those of the next ones."""

    slots: Slots
    rows: Rows
    supervised: torch.Tensor
    """bool [T, N]: which slots carry a loss at each step."""


@dataclass(frozen=True)
class Schedule:
    """See the module's text."""

    batch: Batch
    layout: Layout
    parts: tuple[Part, ...]
    counts: torch.Tensor
    """float64 [T], on the host: what the share's own slots of each step weigh, sampled away or not."""
    step_weights: torch.Tensor
    """float64 [T], on the host: what a step weighs."""


def make_schedule(
    batch: Batch,
    mask: torch.Tensor,
    depths: torch.Tensor | None,
    normalization: Normalization,
    step_weights: torch.Tensor,
    device: torch.device,
    slots_alive: int | None = None,
    told: torch.Tensor | None = None,
) -> Schedule:
    """The schedule of ``batch``, which is on the host, for ``device``.

    Args:
        mask: bool [T, B, L], who is supervised.
        depths: int64 [B, L], how many steps a slot may run; None: all.
        slots_alive: in one part, at most, rounded up to 64; None: all.
        told: int64 [B, L], the positions that the draft's rotary embedding is told; None: the batch's.
    """
    told = batch.positions if told is None else told
    # Of the whole batch: a document may belong to several ranks.
    weights = batch.shard.mask_owned(_weights(mask, batch.documents, normalization).flatten(1))
    counts, sampled = weights.sum(1), mask.flatten(1)
    steps = torch.arange(1, len(mask) + 1)[:, None]
    if depths is not None:
        sampled = sampled & (steps <= depths.flatten())
    sampled = batch.shard.mask_owned(sampled)
    longest = (sampled * steps).amax(0)
    parts = tuple(
        _part(batch, told, longest * of_part, sampled, weights, device)
        for of_part in _neighbours(longest > 0, slots_alive)
    )
    layout = Layout.of(batch.positions, send(told, device), batch.shard)
    return Schedule(batch.to(device), layout, parts, counts, step_weights)


def _neighbours(used: torch.Tensor, most: int | None) -> Iterator[torch.Tensor]:
    """Groups of about equal size of the slots ``used``, bool [n]: masks like it, one of nothing where there is none."""
    count = int(used.sum())
    groups = max(-(-count // (most or count or 1)), 1)
    size = round_up(max(-(-count // groups), 1))
    group = (used.cumsum(0) - 1) // size
    return (used & (group == n) for n in range(max(-(-count // size), 1)))


def _part(
    batch: Batch, told: torch.Tensor, longest: torch.Tensor, sampled: torch.Tensor, weights: torch.Tensor,
    device: torch.device,
) -> Part:  # fmt: skip
    """Of the slots that run ``longest`` steps, int64 [m]; ``sampled`` and ``weights`` are [T, m]."""
    slots = Slots.of(batch.positions, longest, device, batch.shard, told)
    supervised = sampled[:, slots.host_index] & slots.real
    rows = _rows(slots, supervised, weights[:, slots.host_index].float(), device)
    return Part(slots, rows, send(supervised, device))


def _weights(mask: torch.Tensor, documents: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """float64 [T, B, L]: what a slot weighs at a step; 0 where it is not supervised."""
    if normalization is Normalization.token:
        return mask.double()
    of_slot = documents.expand(mask.shape)
    per_document = torch.zeros(*mask.shape[:2], int(documents.max()) + 1, dtype=torch.float64)
    per_document.scatter_add_(2, of_slot, mask.double())
    return mask / per_document.gather(2, of_slot).clamp(min=1)


def _rows(slots: Slots, supervised: torch.Tensor, weights: torch.Tensor, device: torch.device) -> Rows:
    step, slot = supervised.nonzero(as_tuple=True)
    position = slots.host_index[slot] + 1 + step
    order = position.argsort(stable=True)
    step, slot = step[order], slot[order]
    labels, label = position[order].unique_consecutive(return_inverse=True)
    starts = torch.tensor([0, *slots.alive]).cumsum(0)
    source, chunks = _chunked(label, LABEL_CHUNK[device.type])
    if not len(labels):
        step, slot, label, labels = (torch.zeros(1, dtype=torch.long) for _ in range(4))
    filler = source < 0
    source = source.clamp(min=0)
    step, slot, label = step[source], slot[source], label[source]
    first = torch.repeat_interleave(
        torch.tensor([span.start for _, span in chunks]), torch.tensor([rows.stop - rows.start for rows, _ in chunks])
    )
    columns = {
        "output": starts[step] + slot,
        "step": step,
        "cell": torch.where(filler, supervised.numel(), step * supervised.shape[1] + slot),
        "weight": weights[step, slot].masked_fill(filler, 0.0),
        "label": torch.where(filler, first, label),
        "labels": torch.nn.functional.pad(labels, (0, chunks[-1][1].stop - len(labels))),
    }
    return Rows(**{name: send(x, device) for name, x in columns.items()}, chunks=tuple(chunks))


def _chunked(label: torch.Tensor, size: int) -> tuple[torch.Tensor, list[tuple[slice, slice]]]:
    """Rows of ``label`` int64 [n], ascending, in chunks of ``size`` labels.

    Returns:
        int64 [M]: which of the n rows each one is, -1 for filler; the chunks, as slices of the M rows and of labels.
    """
    count = int(label[-1]) + 1 if len(label) else 1
    bounds = torch.searchsorted(label, torch.arange(0, count + size, size)).tolist()
    source: list[torch.Tensor] = []
    chunks, end = [], 0
    for n, (start, stop) in enumerate(pairwise(bounds)):
        length = round_up(max(stop - start, 1))
        source += [torch.arange(start, stop), torch.full((length - (stop - start),), -1)]
        chunks.append((slice(end, end + length), slice(n * size, min((n + 1) * size, round_up(count, LABEL_MULTIPLE)))))
        end += length
    return torch.cat(source), chunks
