"""The schedule of a training step: slots, steps and labels of a batch, known before any model runs.

Slot t is the draft's run right after the target emitted x_{t+1}; its step i reads x_{t+1+i} and predicts x_{t+2+i}.
The schedule lists the steps that each slot runs, what each step sees, and the (slot, step) pairs that carry a loss.
It is made on the host, ahead of the step, so that nothing in the step waits for the device.

The rows of a batch are laid end to end: a document is a range of flat positions, and the number of rows appears
nowhere.  Slots are sorted by their number of steps, so that the slots of a step are the first ones of the step before:
a view, no gather.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch.nn.functional import pad

from nemo_speculative.algorithms.common.attention import CausalBlock, block_for, round_up, rounded_width
from nemo_speculative.config.schema import DepthSampling, DraftConfig, Normalization
from nemo_speculative.data.batch import Batch, Span, supervision_mask
from nemo_speculative.distributed.context_parallel import FULL_BATCH, ContextShard
from nemo_speculative.utils.devices import to_device

LABEL_CHUNK = {"cpu": 128, "cuda": 512}
"""Positions whose target logits [P, V] exist at once."""
LABEL_MULTIPLE = 16
"""The number of these positions is rounded up to a multiple of it: a small one, as each position costs V products."""
SHAPE_MULTIPLE = 64
"""Numbers of slots and rows are rounded up to a multiple of it: oneDNN builds and keeps a primitive for every shape."""


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch that this rank computes: m of N = B * L, all of them without context parallelism."""

    host_positions: torch.Tensor
    """int64 [N], on the host: from 0 in every document."""
    position_ids: torch.Tensor
    """int64 [m], on the device: for the draft's rotary embedding; not the positions where these are skipped."""
    shard: ContextShard

    @classmethod
    def of(cls, positions: torch.Tensor, position_ids: torch.Tensor, shard: ContextShard = FULL_BATCH) -> "Layout":
        """The layout of a batch: ``positions`` on the host and ``position_ids`` on the device, int64 [B, L] each."""
        return cls(positions.flatten(), shard.local(position_ids).flatten(), shard)

    @cached_property
    def block(self) -> CausalBlock:
        """The keys that every position sees; needed by the lower layers of a draft of several layers only."""
        index = self.shard.to_global(torch.arange(len(self.position_ids)))
        return block_for(self.host_positions, index, self.position_ids.device)


@dataclass(frozen=True)
class Slots:
    """N slots, those with the most steps first; N is rounded up with copies of the last slot."""

    host_index: torch.Tensor
    """int64 [N], on the host: the slot's position in the shard."""
    real: torch.Tensor
    """bool [N], on the host: not a copy."""
    active: tuple[int, ...]
    """Slots computed at each step, rounded up."""
    token_window: slice
    """The positions of the shard whose tokens and features the slots read."""
    key_window: slice
    """The flat positions that hold the step-0 keys they see."""
    index: torch.Tensor
    """int64 [N]: the slot's position within ``token_window``."""
    position_ids: torch.Tensor
    """int64 [N]: of step 0, for the draft's rotary embedding."""
    blocks: tuple[CausalBlock, ...]
    """The keys of ``key_window`` that the slots of each step see."""

    @classmethod
    def of(
        cls, positions: torch.Tensor, steps: torch.Tensor, device: torch.device, shard: ContextShard = FULL_BATCH,
        position_ids: torch.Tensor | None = None,
    ) -> "Slots":  # fmt: skip
        """The slots that run ``steps`` steps.

        Args:
            positions: int64 [B, L], on the host, from 0 in every document.
            steps: int64 [B, L], or [m] of the shard, on the host: steps of the slot at each position, 0 for no slot.
            position_ids: int64 [B, L], on the host, for the draft's rotary embedding; None: ``positions``.
        """
        steps, flat = steps.flatten(), positions.flatten()
        used = steps.nonzero()[:, 0]
        own = steps[used]
        order = used[own.argsort(descending=True, stable=True)] if len(used) else torch.zeros(1, dtype=torch.long)
        index = torch.cat((order, order[-1:].expand(round_up(len(order), SHAPE_MULTIPLE) - len(order))))
        longest = int(own.max()) if len(used) else 1
        active = tuple(round_up(max(int((own > i).sum()), 1), SHAPE_MULTIPLE) for i in range(longest))
        first, end = int(index.min()), int(index.max()) + 1
        at = shard.to_global(index)
        lowest, key_end = int(at.min()), int(at.max()) + 1
        start = lowest - int(flat[lowest])
        key_window = slice(start, min(start + rounded_width(key_end - start), len(flat)))
        blocks = {n: block_for(flat[key_window], at[:n] - start, device) for n in set(active)}
        return cls(
            host_index=index,
            real=torch.arange(len(index)) < len(used),
            active=active,
            token_window=slice(first, min(end + longest, len(steps))),
            key_window=key_window,
            index=to_device(index - first, device),
            position_ids=to_device((flat if position_ids is None else position_ids.flatten())[at], device),
            blocks=tuple(blocks[n] for n in active),
        )


@dataclass(frozen=True)
class SlotChunk:
    """Neighboring slots, whose loss and gradient are computed before those of the next chunk.

    The (slot, step) pairs that carry a loss are M rows in ascending order of their label.  Labels come in chunks of
    equal size, and each chunk's rows are rounded up with filler rows of weight 0.
    """

    slots: Slots
    supervised: torch.Tensor
    """bool [T, N]: which slots carry a loss at each step."""
    output: torch.Tensor
    """int64 [M]: index of the row in the outputs of all steps, concatenated."""
    step: torch.Tensor
    """int64 [M]"""
    cell: torch.Tensor
    """int64 [M]: step * N + slot; T * N for filler."""
    weight: torch.Tensor
    """float32 [M]; 0 for filler."""
    label: torch.Tensor
    """int64 [M]: index into ``label_positions``."""
    label_positions: torch.Tensor
    """int64 [P], ascending: positions of the shard whose target output is a label; the last chunk is rounded up."""
    label_chunks: tuple[tuple[slice, slice], ...]
    """Pairs of a slice of the rows and the slice of ``label_positions`` that holds their labels."""


@dataclass(frozen=True)
class Schedule:
    """The slots, steps and labels that a training step computes for one micro-batch."""

    batch: Batch
    input_ids: torch.Tensor
    """int64 [B, L], or [1, m] of the shard."""
    layout: Layout
    chunks: tuple[SlotChunk, ...]
    counts: torch.Tensor
    """float64 [T], on the host: weight of this rank's supervised slots of each step, sampled away or not."""
    step_weights: torch.Tensor
    """float64 [T], on the host: the weight of each step in the loss."""


def step_weights(config: DraftConfig) -> torch.Tensor:
    """float64 [T]: the weight of each step in the loss."""
    return torch.tensor([config.step_decay**i for i in range(config.ttt_steps)], dtype=torch.float64)


def make_schedule(
    batch: Batch, config: DraftConfig, seed: int | None, device: torch.device, chunk_slots: int | None = None
) -> Schedule:
    """The schedule of ``batch``, which is on the host, for ``device``.

    Args:
        seed: of the draws of depths and position skips; None, in validation: nothing is drawn.
        chunk_slots: slots of one chunk, at most, rounded up to 64; None: all.

    Raises:
        ValueError: the batch does not name the conversations that something is drawn for.
    """
    mask = supervision_mask(batch.loss_mask, batch.documents, config.ttt_steps, config.mask_convention)
    # Of the whole batch: a document may belong to several ranks.
    weights = batch.shard.mask_owned(_slot_weights(mask, batch.documents, config.normalization).flatten(1))
    mask, steps = mask.flatten(1), torch.arange(1, config.ttt_steps + 1)[:, None]
    weight_of_step, position_ids = step_weights(config), batch.positions
    if seed is not None:
        sampled = config.depth_sampling is DepthSampling.geometric
        if (sampled or config.position_offset is not None) and not batch.spans:
            raise ValueError("depths and position skips are drawn for each conversation: the batch has no spans")
        if sampled:
            mask = mask & (steps <= geometric_depths(batch, config.step_decay, seed).flatten())
            # A slot that reaches a later step weighs 1 there.
            weight_of_step = torch.ones_like(weight_of_step)
        if config.position_offset is not None:
            position_ids = skipped_positions(batch, config.position_offset, seed)
    mask = batch.shard.mask_owned(mask)
    longest = (mask * steps).amax(0)
    chunks = []
    for chosen in _neighbors(longest > 0, chunk_slots):
        slots = Slots.of(batch.positions, longest * chosen, device, batch.shard, position_ids)
        supervised = mask[:, slots.host_index] & slots.real
        chunks.append(_slot_chunk(slots, supervised, weights[:, slots.host_index].float(), device))
    layout = Layout.of(batch.positions, to_device(position_ids, device), batch.shard)
    sent = batch.to(device)
    return Schedule(sent, sent.shard.local(sent.input_ids), layout, tuple(chunks), weights.sum(1), weight_of_step)


def _neighbors(used: torch.Tensor, most: int | None) -> Iterator[torch.Tensor]:
    """Splits the slots ``used``, bool [n], into groups of about equal size: a mask each, at least one."""
    count = max(int(used.sum()), 1)
    groups = math.ceil(count / (most or count))
    size = round_up(math.ceil(count / groups), SHAPE_MULTIPLE)
    group = (used.cumsum(0) - 1) // size
    return (used & (group == n) for n in range(math.ceil(count / size)))


def _slot_weights(mask: torch.Tensor, documents: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """float64 [T, B, L]: the weight of a slot at a step; 0 where it is not supervised."""
    if normalization is Normalization.token:
        return mask.double()
    of_slot = documents.expand(mask.shape)
    per_document = torch.zeros(*mask.shape[:2], int(documents.max()) + 1, dtype=torch.float64)
    per_document.scatter_add_(2, of_slot, mask.double())
    return mask / per_document.gather(2, of_slot).clamp(min=1)


def _slot_chunk(slots: Slots, supervised: torch.Tensor, weights: torch.Tensor, device: torch.device) -> SlotChunk:
    step, slot = supervised.nonzero(as_tuple=True)
    position = slots.host_index[slot] + 1 + step
    order = position.argsort(stable=True)
    step, slot = step[order], slot[order]
    label_positions, label = position[order].unique_consecutive(return_inverse=True)

    # Each chunk of labels with its rows, and filler (-1), whose label is the chunk's first.
    size, count = LABEL_CHUNK[device.type], max(len(label_positions), 1)
    bounds = torch.searchsorted(label, torch.arange(0, count + size, size)).tolist()
    sources, first_labels, chunks, end = [], [], [], 0
    for n, (start, stop) in enumerate(pairwise(bounds)):
        length = round_up(max(stop - start, 1), SHAPE_MULTIPLE)
        sources.append(pad(torch.arange(start, stop), (0, length - (stop - start)), value=-1))
        first_labels.append(torch.full((length,), n * size))
        chunks.append((slice(end, end + length), slice(n * size, min((n + 1) * size, round_up(count, LABEL_MULTIPLE)))))
        end += length
    source, first_label = torch.cat(sources), torch.cat(first_labels)
    filler = source < 0
    if not len(label_positions):
        step, slot, label, label_positions = (torch.zeros(1, dtype=torch.long) for _ in range(4))
    step, slot, label = (x[source.clamp(min=0)] for x in (step, slot, label))
    columns = {
        "supervised": supervised,
        "output": torch.tensor([0, *slots.active]).cumsum(0)[step] + slot,
        "step": step,
        "cell": torch.where(filler, supervised.numel(), step * supervised.shape[1] + slot),
        "weight": weights[step, slot].masked_fill(filler, 0.0),
        "label": torch.where(filler, first_label, label),
        "label_positions": pad(label_positions, (0, chunks[-1][1].stop - len(label_positions))),
    }
    return SlotChunk(slots, **{name: to_device(x, device) for name, x in columns.items()}, label_chunks=tuple(chunks))


def conversation_uniform(name: str, span: Span, *shape: int) -> torch.Tensor:
    """Uniform draws in [0, 1) of ``shape`` for a conversation, on the host.

    They depend on ``name``, the conversation and the epoch alone: on neither packing, nor rank count, nor a restart.
    """
    key = f"{name}:{span.epoch}:{span.id}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def geometric_depths(batch: Batch, decay: float, seed: int) -> torch.Tensor:
    """Steps of each slot, int64 [B, L], at least 1, drawn with P(depth > i) = decay^i.

    A slot survives to step i with probability decay^i, and weighs 1 there instead of decay^i.  The expected gradient
    is that of the weighted loss (E[1{depth > i}] = decay^i), at half the work of seven steps.
    """
    depths = torch.ones_like(batch.positions)
    for span in batch.spans:
        u = conversation_uniform(f"depth:{seed}", span, span.end - span.start)
        # u in [0, 1): u < decay^i holds for i up to log u / log decay.
        steps = torch.log(u.double().clamp(min=1e-300)) / torch.log(torch.tensor(decay, dtype=torch.float64))
        depths[span.row, span.start : span.end] = steps.ceil().clamp(1, 1 << 30).long()
    return depths


def skipped_positions(batch: Batch, longest: int, seed: int) -> torch.Tensor:
    """Position ids int64 [B, L] with a random skip in every document below ``longest`` tokens (PoSE, 2309.10400).

    A rotary embedding sees differences of positions alone: moving a whole document changes nothing.  So a document is
    cut in two at a random place and its second part is moved away: over many documents every distance up to the longest
    position occurs between the tokens before and after a cut, while near neighbors stay near.  The cut is uniform
    within the document, and the skip among those that keep its last position below ``longest``.  Only the draft's
    rotary embedding uses them; the target's features are those of the true positions.
    """
    positions = batch.positions.clone()
    for span in batch.spans:
        length = span.end - span.start
        cut, skip = conversation_uniform(f"position:{seed}", span, 2).tolist()
        first = span.start + 1 + int(cut * (length - 1))
        positions[span.row, first : span.end] += int(skip * (max(longest - length, 0) + 1))
    return positions
