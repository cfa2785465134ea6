"""The EAGLE-3 objective (2503.01840): Σ_i decay^i · (soft cross-entropy of step i, over its slots) / (their number).

The label of slot t at step i is the target's distribution of x_{t+2+i}, restricted to the draft vocabulary and
renormalised.  A slot whose target argmax lies outside the draft vocabulary carries no loss at that step, but is
counted, and is a miss in every accuracy and in τ.  The counts are those of the global batch, so the loss depends on
neither padding, nor packing, nor the split into micro-batches, nor the number of ranks.
"""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import Batch
from nemo_speculative.drafts.eagle3 import Eagle3Draft
from nemo_speculative.objectives.base import LossSum
from nemo_speculative.objectives.losses import soft_cross_entropy
from nemo_speculative.objectives.slots import Slots, rounded_indices, supervised_slots
from nemo_speculative.targets.base import Supervision, Target

LABEL_CHUNK = 1024
"""Rows of target logits [rows, V] alive at once."""


@dataclass(frozen=True)
class Labels:
    """The target's view of the P positions that any slot predicts from."""

    row_of: torch.Tensor
    """int64 [B * L]: where a position's labels are (anything where it has none)."""
    probabilities: torch.Tensor
    """float32 [P, V_d]: zero rows where the target's argmax lies outside the draft vocabulary.  P is rounded up."""
    best: torch.Tensor
    """int64 [P]: the target's argmax, a target id."""


class Eagle3Objective:
    """See the module's text.

    Args:
        num_steps: T, steps of the unroll.
        step_decay: step i weighs ``step_decay ** i``.
        tau_steps: draft tokens of the chain that ``tau`` simulates.
        recompute: activation checkpointing of every step.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int,
        step_decay: float,
        convention: MaskConvention,
        tau_steps: int,
        recompute: bool = False,
    ):
        self.target, self.num_steps, self.convention = target, num_steps, convention
        self.weights = torch.tensor([step_decay**i for i in range(num_steps)], dtype=torch.float64)
        self.tau_steps, self.recompute = min(tau_steps, num_steps), recompute

    def counts(self, batch: Batch) -> torch.Tensor:
        return supervised_slots(batch, self.num_steps, self.convention).counts.cpu()

    def loss(self, draft: Eagle3Draft, batch: Batch, supervision: Supervision, counts: torch.Tensor) -> LossSum:
        slots = supervised_slots(batch, self.num_steps, self.convention)
        labels = self._labels(draft, supervision.last_hidden, slots)
        outputs = draft.unroll(
            self.target.embed(batch.input_ids),
            supervision.aux,
            batch.positions,
            batch.documents,
            slots.index,
            self.num_steps,
            run_step=self._run,
        )
        scale = (self.weights / counts.clamp(min=1)).to(device=slots.index.device, dtype=torch.float32)
        losses, hits = zip(
            *(self._step(draft, output, labels, slots, i) for i, output in enumerate(outputs)), strict=True
        )
        loss_sums = torch.stack(losses)
        sums = {"loss": loss_sums.detach().double(), "count": slots.counts, **_chain_sums(torch.stack(hits), slots)}
        return LossSum((loss_sums * scale).sum(), sums)

    def _run(self, function, *args):
        return checkpoint(function, *args, use_reentrant=False) if self.recompute else function(*args)

    def _step(self, draft: Eagle3Draft, output: torch.Tensor, labels: Labels, slots: Slots, i: int):
        """Loss summed over the supervised slots of step i, and which slots hit: scalar, bool [B, S]."""
        active, real = rounded_indices(slots.supervised[i].flatten())
        label = labels.row_of[_flat_positions(slots, 1 + i, labels.row_of)[active]]
        rows = output.flatten(0, 1)[active]
        loss, best = self._run(_head_loss, draft, rows, labels.probabilities, label, real)
        hits = torch.zeros_like(slots.supervised[i]).flatten()
        hits[active[real]] = (draft.draft_ids[best] == labels.best[label])[real]
        return loss, hits.view_as(slots.supervised[i])

    @torch.no_grad()
    def _labels(self, draft: Eagle3Draft, last_hidden: torch.Tensor, slots: Slots) -> Labels:
        flat = last_hidden.flatten(0, 1)
        needed = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        for i in range(self.num_steps):
            positions = _flat_positions(slots, 1 + i, needed)
            needed[positions[slots.supervised[i].flatten()]] = True
        row_of, ids = needed.cumsum(0) - 1, draft.draft_ids
        rows = flat[rounded_indices(needed)[0]]
        probabilities = torch.empty(len(rows), len(ids), dtype=torch.float32, device=flat.device)
        best = torch.empty(len(rows), dtype=torch.long, device=flat.device)
        for start in range(0, len(rows), LABEL_CHUNK):
            chunk = slice(start, start + LABEL_CHUNK)
            logits = self.target.logits(rows[chunk]).float()
            best[chunk] = logits.argmax(-1)
            inside = draft.t2d[best[chunk]][:, None]
            probabilities[chunk] = logits[:, ids].softmax(-1) * inside
        return Labels(row_of, probabilities, best)

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """``loss``, ``ploss_i``, ``acc_i`` for each step, and ``tau`` of a chain of ``tau_steps`` draft tokens."""
        count = sums["count"].clamp(min=1)
        per_step, accuracy = sums["loss"] / count, sums["hit"] / count
        chain = (sums["prefix_hit"] / sums["prefix_count"].clamp(min=1))[: self.tau_steps]
        out = {"loss": float((per_step * self.weights.to(per_step.device)).sum()), "tau": 1.0 + float(chain.sum())}
        out |= {f"ploss_{i}": float(x) for i, x in enumerate(per_step)}
        return out | {f"acc_{i}": float(x) for i, x in enumerate(accuracy)}


def _head_loss(draft: Eagle3Draft, output, probabilities, label, real):
    """The summed loss and the draft's choice.  All of [rows, V_d] is made in here, where it can be recomputed."""
    logits = draft.logits(output)
    return soft_cross_entropy(logits, probabilities[label] * real[:, None]).sum(), logits.argmax(-1)


def _flat_positions(slots: Slots, ahead: int, like: torch.Tensor) -> torch.Tensor:
    """int64 [B * S]: the position ``ahead`` of each slot, as an index into the flattened [B * L] batch."""
    rows = len(slots.index)
    length = like.numel() // rows
    start = torch.arange(rows, device=slots.index.device)[:, None] * length
    return ((slots.index + ahead).clamp(max=length - 1) + start).flatten()


def _chain_sums(hits: torch.Tensor, slots: Slots) -> dict[str, torch.Tensor]:
    """How often a chain's first i + 1 tokens all hit, over the slots supervised up to that step: float64 [T] each."""
    prefix = hits.int().cumprod(0).bool() & slots.supervised
    return {
        "hit": (hits & slots.supervised).sum((1, 2)).double(),
        "prefix_hit": prefix.sum((1, 2)).double(),
        "prefix_count": slots.counts,
    }
