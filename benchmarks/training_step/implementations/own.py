"""This project's training step, the same with the dense reference ("textbook"), and the target's forward alone."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import get_class

from benchmarks.training_step.case import SEED, STEP_DECAY, Setup
from benchmarks.training_step.implementations.base import Implementation, Trainer, copy_weights
from benchmarks.training_step.setup import draft_config, new_draft
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.ttt import LossSum, TTTObjective
from nemo_speculative.algorithms.reference.eagle3 import eagle3_loss
from nemo_speculative.config.schema import DepthSampling, ParallelismConfig, TrainerConfig
from nemo_speculative.data.batch import Batch, collate, pack
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.distributed.parallelism import context_group, fast_float32_matmuls, process_group, shard_draft
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.trainer import TTTModule

CPU = torch.device("cpu")
TAU_STEPS = 5
CHANGES: dict[str, dict[str, Any]] = {"geometric": {"depth_sampling": DepthSampling.geometric}}
"""Changes of the draft's configuration, by variant."""


class Target(Implementation):
    """The target's forward alone, a lower bound of the time of online training."""

    packages = ("transformers",)

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        self.resources.enter_context(fast_float32_matmuls(CPU))
        self.target = load_target(setup)
        self.batches = packed_batches(setup)

    def step(self, batch: Batch) -> None:
        self.target.compute_hidden_states(batch)


class Ours(Trainer):
    """The components of the project's trainer, combined as the trainer does."""

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        # The trainer's own wrapper: float32 weights, with bfloat16 copies to compute with.  If a launcher has started
        # several ranks, they share the rows.
        parallelism = ParallelismConfig(context=int(os.environ.get("WORLD_SIZE", "1")))
        dims = self.resources.enter_context(process_group(CPU, parallelism))
        self.context = context_group(dims)
        self.resources.enter_context(fast_float32_matmuls(CPU))
        self.target = load_target(setup)
        self.batches = packed_batches(setup)
        self.objective = self.make_objective(setup, variants)
        self.trainee = shard_draft(TTTModule(load_draft(setup, self.target), self.objective), dims, setup.dtype)
        self.train(self.trainee.parameters(), fused=True)

    def make_objective(self, setup: Setup, variants: frozenset[str]) -> TTTObjective:
        changes = {key: value for variant in variants for key, value in CHANGES[variant].items()}
        config = dataclasses.replace(draft_config(setup.case), **changes)
        objective: type[TTTObjective] = get_class(config.objective)
        alive = TrainerConfig().slots(setup.case.size.hidden_size, CPU.type)
        return objective(self.target, config, seed=SEED, tau_steps=TAU_STEPS, chunk_slots=alive, context=self.context)

    def loss(self, batch: Batch) -> torch.Tensor:
        schedule = self.objective.schedule(batch, CPU)
        return self.trainee(schedule, self.target.compute_hidden_states(schedule.batch), schedule.counts).loss


class Textbook(Ours):
    """The same trainer with the dense reference, :func:`eagle3_loss`."""

    def make_objective(self, setup: Setup, variants: frozenset[str]) -> Any:
        return _Dense(self.target, setup.case.num_steps)


@dataclass(frozen=True)
class _WholeBatch:
    """A schedule of the dense reference: the unchanged batch."""

    batch: Batch
    counts: torch.Tensor


class _Dense:
    """The reference's loss as an objective; it counts its supervised slots itself."""

    def __init__(self, target: HFTarget, num_steps: int):
        self.target, self.num_steps = target, num_steps

    def schedule(self, batch: Batch, device: torch.device, training: bool = True) -> "_WholeBatch":
        return _WholeBatch(batch, torch.zeros(self.num_steps, dtype=torch.float64))

    def loss(self, draft: Any, schedule: "_WholeBatch", output: TargetOutput, counts: torch.Tensor) -> LossSum:
        weights = dict(draft.named_parameters()) | {"d2t": draft.d2t}
        loss = eagle3_loss(weights, draft.shape, self.target, schedule.batch, output, self.num_steps, STEP_DECAY)
        return LossSum(loss, {})

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return {}


def load_target(setup: Setup) -> HFTarget:
    aux_layers = draft_config(setup.case).chosen_aux_layers(setup.case.size.num_layers)
    return HFTarget(setup.target, aux_layers=aux_layers, dtype=setup.dtype)


def load_draft(setup: Setup, target: HFTarget) -> Draft:
    """The draft with the weights and vocabulary of ``setup``."""
    draft = new_draft(setup.case, target.config).attach(target)
    draft.set_vocab_mapping(VocabMapping(setup.draft_ids, setup.case.size.vocab_size, 1.0))
    copy_weights(draft, setup.draft_weights, {})
    return draft


def packed_batches(setup: Setup) -> list[Batch]:
    """The conversations, packed by this project."""
    size = setup.case.size
    documents = [
        TokenRow(str(n), c.input_ids.tolist(), c.loss_mask.tolist(), "") for n, c in enumerate(setup.conversations)
    ]
    packed = pack([len(d.input_ids) for d in documents], size.row_tokens, SEED)
    chunks = [packed[i : i + size.rows] for i in range(0, len(packed), size.rows)]
    return [collate([[documents[d] for d in row] for row in rows], size.row_tokens, pad_id=0) for rows in chunks]
