"""Seconds and bytes of a step of a job: what is counted, at the speed that this machine shows in a trial."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from transformers import AutoModelForCausalLM

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.collectives import num_ranks
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.distributed.parallelism import fast_float32_matmuls
from nemo_speculative.training.cost import FLOAT32, Amount, DraftCost, TargetCost
from nemo_speculative.training.peak import Memory, Placement, step_memory
from nemo_speculative.training.speed_probe import Rates, SpeedProbe

BYTES = {"float32": 4, "bfloat16": 2}
SAMPLE = 8
"""Micro-batches that are looked at."""


@dataclass(frozen=True)
class Models:
    """What is counted of a job's target and draft; both on the meta device, without weights."""

    target: TargetCost
    draft: DraftCost

    @classmethod
    def of(cls, job: TrainJob, config: Any, shape: DraftShape) -> "Models":
        """``config`` is the target's, of transformers."""
        draft: type[Draft] = get_class(job.draft._target_)
        aux = len(job.draft.chosen_aux_layers(config.num_hidden_layers))
        with torch.device("meta"):
            target = TargetCost(AutoModelForCausalLM.from_config(config))
            built = draft(shape)  # type: ignore[call-arg]
        return cls(target, DraftCost(built, aux_layers=aux, target_hidden=config.hidden_size))


@dataclass(frozen=True)
class Prediction:
    """Of one optimizer step on one rank; communication between ranks is not in it."""

    target_seconds: float
    """Of the target's forward passes."""
    other_seconds: float
    """Of all that cached training needs too, but for reading the features."""
    tokens: float
    """Of this rank's rows, padding included."""
    multiply_adds: dict[str, float]
    """By part."""

    @property
    def online(self) -> float:
        """Seconds of a step."""
        return self.target_seconds + self.other_seconds

    @property
    def cached(self) -> float:
        """Seconds of a step that reads its features instead."""
        return self.other_seconds


def count(job: TrainJob, models: Models, batches: list[Batch], device: torch.device) -> list[Amount]:
    """What there is to compute on ``device`` in each of ``batches``."""
    objective: type[TTTObjective] = get_class(job.draft.objective)
    alive = job.trainer.slots(models.draft.hidden, device.type)
    context = ContextGroup.planned(job.parallelism.context)
    built = objective.build(None, job.draft, seed=job.seed, tau_steps=1, chunk_slots=alive, context=context)  # type: ignore[arg-type]
    return [Amount.of(built.schedule(batch), models.draft.num_layers > 1) for batch in batches[:SAMPLE]]


def predict(
    models: Models, amounts: list[Amount], rates: Rates, micro_batches: int, device: torch.device,
    whole_rows: bool = False,
) -> Prediction:  # fmt: skip
    """Of a step of ``micro_batches`` of which ``amounts`` are examples.

    Args:
        whole_rows: ranks that share rows have the target compute all of them.
    """
    amount = Amount.mean(amounts)
    target = models.target.multiply_adds(amount.of_whole_rows if whole_rows else amount)
    draft = models.draft.multiply_adds(amount)
    draft |= models.target.labels(amount)
    # On CUDA the host makes the next schedule meanwhile; on a CPU it takes the time of the products.
    schedule = 0.0 if device.type == "cuda" else rates.schedule * amount.tokens
    each = sum(draft.values()) * rates.draft + schedule
    return Prediction(
        target_seconds=micro_batches * sum(target.values()) * rates.target,
        other_seconds=micro_batches * each + rates.update,
        tokens=micro_batches * amount.tokens,
        multiply_adds={name: micro_batches * value for name, value in (target | draft).items()},
    )


def measure(job: TrainJob, models: Models, config: Any, shape: DraftShape, batch: Batch, device: torch.device) -> Rates:
    """The speed of this machine at the job's parts, on a piece of ``batch``."""
    with fast_float32_matmuls(device):
        return SpeedProbe(job, config, shape, batch, device).rates(models.target, models.draft)


def memory(job: TrainJob, models: Models, amounts: list[Amount], device: torch.device) -> Memory:
    """Of one device, at its peak on the largest of ``amounts``."""
    largest = max(amounts, key=lambda amount: models.draft.kept_bytes(amount, 1))
    ranks = num_ranks()
    _, shard = job.parallelism.sizes(ranks)
    place = Placement(
        ranks=ranks,
        shards=shard * job.parallelism.context,
        target_element=BYTES[job.model.dtype.value],
        element=BYTES[job.trainer.dtype.value],
        device_type=device.type,
        target_share=job.backend.share_of_layers(ranks),
        ends_divided=job.backend.SHARDS_EMBEDDING_AND_HEAD,
        target_width=job.backend.share_of_width(ranks),
        gathered_layers=job.backend.GATHERED_LAYERS,
        whole_rows=job.backend.WHOLE_ROWS,
        ahead=job.backend.ahead(ranks, device.type),
        accumulates=len(amounts) > 1,
        offloaded=job.parallelism.offload and device.type == "cuda",
    )
    return step_memory(models.target, models.draft, largest, job.optimizer, place)


def trial_bytes(job: TrainJob, models: Models) -> float:
    """What a trial takes at least: the draft with gradients and moments, a layer of the target, and its head."""
    target, states = models.target, 5 * FLOAT32 * models.draft.all_parameters
    layer = (target.parameters - target.end_parameters) / target.layers
    return states + (layer + target.vocabulary * target.hidden) * BYTES[job.model.dtype.value]


def free_bytes(device: torch.device) -> float:
    """Of the device; on a CPU what Linux says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with Path("/proc/meminfo").open() as lines:
        line = next(line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
