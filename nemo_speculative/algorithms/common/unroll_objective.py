"""What the objectives of the EAGLE family share: supervised slots, an unroll, sums over steps divided by counts.

L = Σ_i decay^i · (Σ of step i's losses over its slots, weighed) / (their total weight), where a slot weighs 1, or one
over the slots of its conversation.  The total is that of the global batch, so the loss depends on neither padding, nor
packing, nor the split into micro-batches, nor the number of ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch

from nemo_speculative.algorithms.common.depths import geometric_depths
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.linear_loss import FrozenHead, Head, Judge, LinearHead, head_loss
from nemo_speculative.algorithms.common.objective import LossSum
from nemo_speculative.algorithms.common.parts import Sums, sum_of_parts
from nemo_speculative.algorithms.common.position_skips import skipped_positions
from nemo_speculative.algorithms.common.schedule import Part, Rows, Schedule, make_schedule
from nemo_speculative.algorithms.common.supervision_mask import supervision_mask
from nemo_speculative.algorithms.common.ttt import Prefix
from nemo_speculative.config.schema import DepthSampling, MaskConvention, Normalization
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.utils.devices import send

CPU = torch.device("cpu")


class UnrollObjective(ABC):
    """See the module's text.

    Args:
        num_steps: T, steps of the unroll.
        step_decay: step i weighs ``step_decay ** i``.
        normalization: what a slot weighs.
        depth_sampling: whether a slot that weighs less at a later step runs it less often instead.
        position_offset: positions of the draft in training go up to this, by a random skip in each document; None: no
            skips.
        seed: of those draws.
        tau_steps: draft tokens of the chain that ``tau`` simulates.
        slots_alive: slots whose unroll is alive at once; None: all.
        context: the ranks that share a batch's tokens.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int,
        step_decay: float,
        convention: MaskConvention,
        normalization: Normalization = Normalization.token,
        depth_sampling: DepthSampling = DepthSampling.none,
        position_offset: int | None = None,
        seed: int = 0,
        tau_steps: int,
        slots_alive: int | None = None,
        context: ContextGroup = NO_CONTEXT_PARALLELISM,
    ):
        self.target, self.num_steps, self.convention = target, num_steps, convention
        self.step_decay, self.depth_sampling, self.seed = step_decay, depth_sampling, seed
        self.position_offset = position_offset
        self.weights = torch.tensor([step_decay**i for i in range(num_steps)], dtype=torch.float64)
        self.normalization = normalization
        self.tau_steps, self.slots_alive, self.context = min(tau_steps, num_steps), slots_alive, context

    @classmethod
    def build(
        cls, target: Target, config: Any, *, seed: int, tau_steps: int, slots_alive: int | None = None,
        context: ContextGroup = NO_CONTEXT_PARALLELISM,
    ) -> "UnrollObjective":  # fmt: skip
        """The objective that the draft's configuration describes."""
        return cls(
            target,
            **cls.own_settings(config),
            num_steps=config.ttt_steps,
            step_decay=config.step_decay,
            convention=config.mask_convention,
            normalization=config.normalization,
            depth_sampling=config.depth_sampling,
            position_offset=config.position_offset,
            seed=seed,
            tau_steps=tau_steps,
            slots_alive=slots_alive,
            context=context,
        )

    @classmethod
    def own_settings(cls, config: Any) -> dict[str, Any]:
        """The arguments that a subclass takes beside the unroll's."""
        return {}

    def schedule(self, batch: Batch, device: torch.device = CPU, training: bool = True) -> Schedule:
        """What a step computes of ``batch``, which is on the host; in validation nothing is sampled."""
        # A slot's last step reads the token, and is judged by the target's output, num_steps behind it.
        batch = replace(batch, shard=self.context.shard(batch.num_tokens, halo=self.num_steps))
        mask = supervision_mask(batch.loss_mask, batch.documents, self.num_steps, self.convention)
        sampled = training and self.depth_sampling is DepthSampling.geometric
        depths = geometric_depths(batch, self.step_decay, self.seed) if sampled else None
        moved = training and self.position_offset is not None
        told = skipped_positions(batch, self.position_offset or 0, self.seed) if moved else None
        # Who survives to a later step weighs 1 there.
        per_step = torch.ones_like(self.weights) if sampled else self.weights
        return make_schedule(batch, mask, depths, self.normalization, per_step, device, self.slots_alive, told)

    def loss(self, draft: Draft, schedule: Schedule, supervision: TargetOutput, counts: torch.Tensor) -> LossSum:
        batch = schedule.batch
        features = self.features(draft, batch, supervision)
        embeddings = draft.embed(batch.shard.local(batch.input_ids))
        prefix = draft.first_pass(embeddings, features, schedule.layout)
        scale = send((schedule.step_weights / counts.clamp(min=1e-9)).float(), features.device)

        def part_loss(seen: Prefix, part: Part) -> tuple[torch.Tensor, Sums]:
            return self._part_loss(draft, seen, part, supervision, scale)

        trained = [p for p in draft.parameters() if p.requires_grad]
        return LossSum(*sum_of_parts(part_loss, prefix, schedule.parts, trained))

    def _part_loss(
        self, draft: Draft, prefix: Prefix, part: Part, supervision: TargetOutput, scale: torch.Tensor
    ) -> tuple[torch.Tensor, Sums]:
        """Of the slots of ``part``, which see ``prefix``; a row of step i is multiplied with scale[i]."""
        rows = part.rows
        predicted = torch.cat(draft.unroll(prefix, part.slots)).index_select(0, rows.output)
        loss, values, hit = self.judged(draft, predicted, supervision, rows, rows.weight * scale[rows.step])
        sums = {name: _by_step(value * rows.weight, rows, self.num_steps) for name, value in values.items()}
        sums["weight"] = _by_step(rows.weight, rows, self.num_steps)
        return loss, sums | chain_sums(_hits(hit, part), part.supervised)

    def features(self, draft: Draft, batch: Batch, supervision: TargetOutput) -> torch.Tensor:
        """What the draft reads of the target: [B, L, h], or of the batch's share [1, m, h]."""
        return draft.read(supervision.aux_hidden_states, supervision.last_hidden_state)

    def judged(
        self, draft: Any, predicted: torch.Tensor, supervision: TargetOutput, rows: Rows, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of the draft's outputs ``predicted`` [M, h], the values [M] of its parts, and the hits, bool [M]."""
        judge = self.judge(draft, supervision.last_hidden_state.flatten(0, 1), rows, weight)
        own = draft.head_weight
        head: Head = FrozenHead(self.target.logits) if own is None else LinearHead(own)
        return head_loss(draft.head_input(predicted), head, judge, rows, weight, len(draft.draft_ids))

    @abstractmethod
    def judge(self, draft: Any, last_hidden_state: torch.Tensor, rows: Rows, weight: torch.Tensor) -> Judge:
        """What judges logits by the target's outputs at the rows' labels.

        Args:
            last_hidden: [B * L, h], or of the batch's share [m, h].
            weight: float32 [M], what the loss of a row is multiplied with.
        """

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """``loss``, ``ploss_i``, ``acc_i`` for each step, and ``tau`` of a chain of ``tau_steps`` draft tokens."""
        per_step = sums["loss"] / sums["weight"].clamp(min=1e-9)
        accuracy = sums["hit"] / sums["count"].clamp(min=1)
        chain = (sums["prefix_hit"] / sums["count"].clamp(min=1))[: self.tau_steps]
        out = {"loss": float((per_step * self.weights.to(per_step.device)).sum()), "tau": 1.0 + float(chain.sum())}
        out |= {f"ploss_{i}": float(x) for i, x in enumerate(per_step)}
        return out | {f"acc_{i}": float(x) for i, x in enumerate(accuracy)}


def _by_step(values: torch.Tensor, rows: Rows, num_steps: int) -> torch.Tensor:
    """float64 [T]: the sums over the rows of each step."""
    zeros = torch.zeros(num_steps, dtype=torch.float64, device=values.device)
    return zeros.index_add_(0, rows.step, values.detach().double())


def _hits(hit: torch.Tensor, part: Part) -> torch.Tensor:
    """bool [T, N] from bool [M]."""
    supervised = part.supervised
    # One cell more than there are, for the filler.
    cells = torch.zeros(supervised.numel() + 1, dtype=torch.bool, device=hit.device)
    return cells.index_copy_(0, part.rows.cell, hit)[:-1].view_as(supervised)


def chain_sums(hits: torch.Tensor, supervised: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often a chain's first i + 1 tokens all hit, over the slots supervised at that step.

    Args:
        hits, supervised: bool [T, N].

    Returns:
        float64 [T] each.
    """
    prefix = hits.int().cumprod(0).bool() & supervised
    return {
        "count": supervised.sum(1).double(),
        "hit": (hits & supervised).sum(1).double(),
        "prefix_hit": prefix.sum(1).double(),
    }
