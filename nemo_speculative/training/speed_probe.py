"""How fast this machine runs the parts of a training step: the trainer's own code on a small piece of a real batch.

Neither the target's weights nor the draft's are read: random ones of the same shape take their place.  A part that
would take longer than a moment is tried on a piece of it, fewer layers or fewer tokens; what the piece takes for each
counted multiply-add (:mod:`nemo_speculative.training.cost`) is what the whole takes.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import get_class
from torch.nn.functional import embedding, linear
from transformers import AutoModel

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed import titan
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.document_attention import BY_DOCUMENT, packed_documents
from nemo_speculative.training.cost import Amount, DraftCost, TargetCost
from nemo_speculative.training.optimizer import build_optimizers

TRIAL_SECONDS = 0.6
"""About what one run of a part may take."""
RUNS = 3
PROBE_WIDTH = 1024
EFFICIENCY = 0.5
"""Of a large matrix product's speed: what a step reaches, to size the trial by."""
SHORTEST = 256
"""Tokens of the smallest piece of a batch."""
TABLE = 1024
"""Rows of the embedding that stands in for the target's."""


@dataclass(frozen=True)
class Rates:
    """Seconds of this machine."""

    target: float
    """For each multiply-add of the target's forward pass."""
    draft: float
    """For each multiply-add of loss and gradient, labels included."""
    schedule: float
    """For each token of a batch, on the host."""
    update: float
    """For clipping and the optimizer's step, once."""


class SpeedProbe:
    """Stand-ins for target and draft on ``device``.

    Args:
        config: the target's, of transformers.
        batch: a micro-batch, on the host.
    """

    def __init__(self, job: TrainJob, config: Any, shape: DraftShape, batch: Batch, device: torch.device):
        self.job, self.config, self.batch, self.device = job, config, batch, device
        self.target_dtype, self.dtype = (getattr(torch, d.value) for d in (job.model.dtype, job.trainer.dtype))
        self.stand_in = StandIn(config.vocab_size, config.hidden_size, self.target_dtype, device)
        draft: type[Draft] = get_class(job.draft._target_)
        with device:
            self.draft = draft(shape).attach(self.stand_in)  # type: ignore[call-arg]
        objective: type[TTTObjective] = get_class(job.draft.objective)
        self.objective = objective.build(
            self.stand_in,  # type: ignore[arg-type]
            job.draft,
            seed=job.seed,
            tau_steps=1,
            chunk_slots=job.trainer.slots(shape.hidden_size, device.type),
        )

    def rates(self, target: TargetCost, draft: DraftCost) -> Rates:
        """All of them, within seconds."""
        update = self._update()  # before the draft is cast
        target_limit, draft_limit = (
            TRIAL_SECONDS * EFFICIENCY * _matmul_speed(dtype, self.device) for dtype in (self.target_dtype, self.dtype)
        )
        amount = Amount.of(self.objective.schedule(self.batch), draft.num_layers > 1)
        return Rates(
            target=self._target(target, amount, target_limit),
            draft=self._draft(target, draft, amount, draft_limit),
            schedule=_seconds(lambda: self.objective.schedule(self.batch), self.device) / amount.tokens,
            update=update,
        )

    def _target(self, cost: TargetCost, amount: Amount, limit: float) -> float:
        all_layers = sum(cost.multiply_adds(amount).values())
        layers = min(max(int(limit / all_layers * cost.layers), 1), cost.layers)
        batch = piece_of(self.batch, limit / (all_layers * layers / cost.layers))
        decoder = _decoder(self.config, layers, self.target_dtype, self.device)
        aux = len(self.job.draft.chosen_aux_layers(self.config.num_hidden_layers))
        embedded = self.stand_in.embed(batch.input_ids.to(self.device))
        positions = batch.positions.to(self.device)

        @torch.no_grad()
        def forward() -> Any:
            with packed_documents(batch.document_lengths()):
                out = decoder(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
            return torch.cat([out] * max(aux, 1), dim=-1)

        done = sum(cost.multiply_adds(Amount.of(self.objective.schedule(batch))).values()) * layers / cost.layers
        return _seconds(forward, self.device) / done

    def _draft(self, target: TargetCost, draft: DraftCost, amount: Amount, limit: float) -> float:
        def work(amount: Amount) -> float:
            return sum((draft.multiply_adds(amount) | target.labels(amount)).values())

        batch = piece_of(self.batch, limit / work(amount))
        schedule = self.objective.schedule(batch, self.device)
        rows, h = batch.input_ids.shape, self.config.hidden_size
        aux = len(self.job.draft.chosen_aux_layers(self.config.num_hidden_layers))
        states = [torch.rand(*rows, width, dtype=self.target_dtype, device=self.device) for width in (aux * h, h)]
        self.draft.to(self.dtype)

        def step() -> None:
            self.objective.loss(self.draft, schedule, TargetOutput(*states), schedule.counts).loss.backward()
            self.draft.zero_grad()

        seconds = _seconds(step, self.device)
        return seconds / work(Amount.of(self.objective.schedule(batch), draft.num_layers > 1))

    def _update(self) -> float:
        """A step of the optimizer; in less than float32 also the copy to compute with, and the gradients' way back."""
        optimizers = build_optimizers(self.job.optimizer, self.draft)
        parameters = list(self.draft.parameters())
        gradients = [torch.full_like(p, 1e-3) for p in parameters]

        def update() -> None:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient if self.dtype == p.dtype else p.detach().to(self.dtype).float()
            titan.clip_grad_norm_(parameters, self.job.optimizer.clip_norm)
            optimizers.step()
            optimizers.zero_grad()

        return _seconds(update, self.device)


class StandIn:
    """Embedding and head of a target, with weights of no meaning."""

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.table = torch.rand(TABLE, hidden, dtype=dtype, device=device)
        self.head = torch.full((vocabulary, hidden), 0.01, dtype=dtype, device=device)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embedding(input_ids % TABLE, self.table)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        return linear(last_hidden_state, self.head)


def _decoder(config: Any, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The first ``layers`` of a decoder; its embedding stays on the meta device, and is not asked."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        shallow.layer_types = kinds[:layers]
    with torch.device("meta"):
        decoder = AutoModel.from_config(shallow, attn_implementation="sdpa", dtype=dtype)
    embedding = decoder.get_input_embeddings()
    for module in decoder.modules():
        if module is not embedding:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                made = torch.full(tensor.shape, 0.01, dtype=tensor.dtype, device=device)
                holder = module._parameters if name in module._parameters else module._buffers
                holder[name] = torch.nn.Parameter(made, requires_grad=False) if holder is module._parameters else made
    decoder.config._attn_implementation = BY_DOCUMENT
    return decoder.eval()


def piece_of(batch: Batch, share: float) -> Batch:
    """About so much of a batch: some of its rows, or a part of the first whose supervised share is the row's."""
    rows, length = batch.input_ids.shape
    if share >= 1:
        return batch
    if (kept := int(share * rows)) >= 1:
        return _window(batch, kept, 0, length)
    width = min(max(int(share * rows * length), SHORTEST), length)
    seen = torch.nn.functional.pad(batch.loss_mask[0].cumsum(0), (1, 0))
    inside = seen[width:] - seen[:-width]
    wanted = float(seen[-1]) * width / length
    return _window(batch, 1, int((inside - wanted).abs().argmin()), width)


def _window(batch: Batch, rows: int, start: int, width: int) -> Batch:
    """The first ``rows``, columns ``start`` to ``start + width``; documents that are cut begin at position 0."""
    cut = slice(0, rows), slice(start, start + width)
    documents, positions = batch.documents[cut], batch.positions[cut]
    positions = positions - positions[:, :1] * (documents == documents[:, :1])
    spans = tuple(
        replace(span, start=max(span.start - start, 0), end=min(span.end - start, width))
        for span in batch.spans
        if span.row < rows and span.start < start + width and span.end > start
    )
    return Batch(batch.input_ids[cut], batch.loss_mask[cut], positions, documents, spans)


def _matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a large matrix product."""
    a, b = torch.rand(2, PROBE_WIDTH, PROBE_WIDTH, device=device).to(dtype)
    return PROBE_WIDTH**3 / _seconds(lambda: a @ b, device)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of a few runs, behind one that is not counted unless it took long enough to be the only one."""
    taken: list[float] = []
    while len(taken) <= RUNS and sum(taken) < RUNS * TRIAL_SECONDS:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:] or taken)
