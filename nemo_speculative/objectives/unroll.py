"""What the objectives of the EAGLE family share: supervised slots, an unroll, sums over steps divided by counts.

L = Σ_i decay^i · (Σ of step i's losses over its slots, weighed) / (their total weight), where a slot weighs 1, or one
over the slots of its conversation.  The total is that of the global batch, so the loss depends on neither padding, nor
packing, nor the split into micro-batches, nor the number of ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nemo_speculative.config.schema import MaskConvention, Normalization
from nemo_speculative.data.batch import Batch
from nemo_speculative.drafts.base import Draft
from nemo_speculative.objectives.base import LossSum
from nemo_speculative.objectives.slots import Slots, rounded_indices, supervised_slots
from nemo_speculative.targets.base import Supervision, Target


@dataclass(frozen=True)
class Rows:
    """The slots of one step as M rows, M rounded up."""

    step: int
    active: torch.Tensor
    """int64 [M]: indices into the flattened [B * S] slots (0 where a row is filler)."""
    weight: torch.Tensor
    """float32 [M]: 0 for filler."""
    positions: torch.Tensor
    """int64 [M]: the position whose target output is the label, as an index into the flattened [B * L] batch."""


@dataclass(frozen=True)
class StepLoss:
    """What a step of the unroll costs, row by row."""

    parts: dict[str, torch.Tensor]
    """Scalars: the weighed sums of the loss's parts; ``loss`` is what is minimised."""
    hit: torch.Tensor
    """bool [M]: the draft's choice is the target's."""


class UnrollObjective(ABC):
    """See the module's text.

    Args:
        num_steps: T, steps of the unroll.
        step_decay: step i weighs ``step_decay ** i``.
        normalization: what a slot weighs.
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
        normalization: Normalization = Normalization.token,
        tau_steps: int,
        recompute: bool = False,
    ):
        self.target, self.num_steps, self.convention = target, num_steps, convention
        self.weights = torch.tensor([step_decay**i for i in range(num_steps)], dtype=torch.float64)
        self.normalization = normalization
        self.tau_steps, self.recompute = min(tau_steps, num_steps), recompute

    @classmethod
    def build(cls, target: Target, config: Any, *, seed: int, tau_steps: int, recompute: bool) -> "UnrollObjective":
        """The objective that the draft's configuration describes."""
        return cls(
            target,
            **cls.own_settings(config, seed),
            num_steps=config.num_steps,
            step_decay=config.step_decay,
            convention=config.mask_convention,
            normalization=config.normalization,
            tau_steps=tau_steps,
            recompute=recompute,
        )

    @classmethod
    def own_settings(cls, config: Any, seed: int) -> dict[str, Any]:
        """The arguments that a subclass takes beside the unroll's."""
        return {}

    def counts(self, batch: Batch) -> torch.Tensor:
        slots = supervised_slots(batch, self.num_steps, self.convention)
        return self._slot_weights(slots, batch).sum((1, 2)).cpu()

    def loss(self, draft: Draft, batch: Batch, supervision: Supervision, counts: torch.Tensor) -> LossSum:
        slots = supervised_slots(batch, self.num_steps, self.convention)
        slot_weights = self._slot_weights(slots, batch)
        labels = self.labels(draft, supervision, slots)
        outputs = draft.unroll(
            draft.embed(batch.input_ids),
            self.features(draft, batch, supervision),
            batch.positions,
            batch.documents,
            slots.index,
            self.num_steps,
            run_step=self._run,
        )
        steps, hits = [], torch.zeros_like(slots.supervised)
        for i, output in enumerate(outputs):
            rows = _rows_of_step(i, slots, slot_weights, batch)
            step = self._run(self.step, draft, output.flatten(0, 1)[rows.active], labels, rows)
            real = rows.weight > 0
            hits[i].view(-1)[rows.active[real]] = step.hit[real]
            steps.append(step.parts)
        scale = (self.weights / counts.clamp(min=1e-9)).to(device=slots.index.device, dtype=torch.float32)
        sums = {name: torch.stack([parts[name] for parts in steps]) for name in steps[0]}
        loss = (sums["loss"] * scale).sum()
        known = {name: value.detach().double() for name, value in sums.items()}
        return LossSum(loss, {**known, "weight": slot_weights.sum((1, 2)), **_chain_sums(hits, slots)})

    def features(self, draft: Draft, batch: Batch, supervision: Supervision) -> torch.Tensor:
        """What the draft reads of the target: [B, L, h]."""
        return draft.read(supervision.aux, supervision.last_hidden)

    @abstractmethod
    def labels(self, draft: Any, supervision: Supervision, slots: Slots) -> Any:
        """Whatever of the target's outputs is computed once for all steps."""

    @abstractmethod
    def step(self, draft: Any, outputs: torch.Tensor, labels: Any, rows: Rows) -> StepLoss:
        """The loss of a step from the draft's outputs [M, h].  All of [M, V] is made in here, to be recomputed."""

    def _run(self, function, *args):
        return checkpoint(function, *args, use_reentrant=False) if self.recompute else function(*args)

    def _slot_weights(self, slots: Slots, batch: Batch) -> torch.Tensor:
        """float64 [T, B, S]: 0 where a step does not supervise a slot."""
        if self.normalization is Normalization.token:
            return slots.supervised.double()
        of_slot = batch.documents.gather(1, slots.index).expand(self.num_steps, -1, -1)
        shape = (self.num_steps, len(of_slot[0]), int(batch.documents.max()) + 1)
        per_document = torch.zeros(shape, dtype=torch.float64, device=of_slot.device)
        per_document.scatter_add_(2, of_slot, slots.supervised.double())
        return slots.supervised / per_document.gather(2, of_slot).clamp(min=1)

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """``loss``, ``ploss_i``, ``acc_i`` for each step, and ``tau`` of a chain of ``tau_steps`` draft tokens."""
        per_step = sums["loss"] / sums["weight"].clamp(min=1e-9)
        accuracy = sums["hit"] / sums["count"].clamp(min=1)
        chain = (sums["prefix_hit"] / sums["count"].clamp(min=1))[: self.tau_steps]
        out = {"loss": float((per_step * self.weights.to(per_step.device)).sum()), "tau": 1.0 + float(chain.sum())}
        out |= {f"ploss_{i}": float(x) for i, x in enumerate(per_step)}
        return out | {f"acc_{i}": float(x) for i, x in enumerate(accuracy)}


def _rows_of_step(i: int, slots: Slots, slot_weights: torch.Tensor, batch: Batch) -> Rows:
    active, real = rounded_indices(slots.supervised[i].flatten())
    weight = slot_weights[i].flatten()[active].float() * real
    return Rows(i, active, weight, flat_positions(slots, 1 + i, batch.input_ids.shape[1])[active])


def flat_positions(slots: Slots, ahead: int, length: int) -> torch.Tensor:
    """int64 [B * S]: the position ``ahead`` of each slot, as an index into the flattened [B * length] batch."""
    start = torch.arange(len(slots.index), device=slots.index.device)[:, None] * length
    return ((slots.index + ahead).clamp(max=length - 1) + start).flatten()


def _chain_sums(hits: torch.Tensor, slots: Slots) -> dict[str, torch.Tensor]:
    """How often a chain's first i + 1 tokens all hit, over the slots supervised up to that step: float64 [T] each."""
    prefix = hits.int().cumprod(0).bool() & slots.supervised
    return {
        "count": slots.counts,
        "hit": (hits & slots.supervised).sum((1, 2)).double(),
        "prefix_hit": prefix.sum((1, 2)).double(),
    }
