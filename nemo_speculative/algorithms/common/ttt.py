"""Training-time test (EAGLE-3, 2503.01840): the objective of drafts that are trained on their own output.

Step i of slot t reads the embedding of x_{t+1+i} and the draft's own output of step i - 1 (at step 0 the target's
features at t), at position t + i, and is compared with the target's output at t + 1 + i.  The loss is

    L = Σ_i decay^i · (Σ_slots weight · loss of step i) / (total weight of step i's slots),

where a slot weighs 1, or one over the supervised slots of its conversation.  The total is that of the global batch, so
the loss depends on neither padding, nor packing, nor the split into micro-batches, nor the number of ranks.

After the step-0 keys and values a slot reads no other slot.  So step 0 is computed at every position only as far as
slots read it (:class:`Step0State`); everything else is computed for supervised slots only, chunk by chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.attention import Pair, unroll_attention
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.layers import rotate
from nemo_speculative.algorithms.common.losses import RowLosses, attach_gradients, chunked_linear_loss
from nemo_speculative.algorithms.common.schedule import (
    Layout,
    LossRows,
    Schedule,
    SlotChunk,
    Slots,
    geometric_depths,
    make_schedule,
    skipped_positions,
)
from nemo_speculative.config.schema import DepthSampling, MaskConvention, Normalization
from nemo_speculative.data.batch import Batch, supervision_mask
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.targets.base import Target, TargetOutput

CPU = torch.device("cpu")
Sums = dict[str, torch.Tensor]


class LossSum(NamedTuple):
    """A loss whose gradients add up over micro-batches and ranks, and the sums for the metrics.

    A tuple, because FSDP2 looks for the tensors of an output where pytrees have them: before torch 2.13 it finds none
    in a dataclass, and then reduces no gradient.
    """

    loss: torch.Tensor
    """Scalar: this micro-batch's part of the global batch's loss."""
    sums: Sums
    """Numerators and denominators, [T] each, to be added over micro-batches and ranks."""


class TTTObjective(ABC):
    """The objective of the module's text; a subclass defines the labels and the loss of a row of logits.

    Args:
        num_steps: T, steps of the unroll.
        step_decay: step i weighs ``step_decay ** i``.
        normalization: the weight of a slot.
        depth_sampling: whether a slot that weighs less at a later step runs it less often instead.
        position_offset: position ids in training go up to this, by a random skip in each document; None: no skips.
        seed: of those draws.
        tau_steps: draft tokens of the chain that ``tau`` simulates.
        chunk_slots: slots whose unroll is in memory at once; None: all.
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
        chunk_slots: int | None = None,
        context: ContextGroup = NO_CONTEXT_PARALLELISM,
    ):
        self.target, self.num_steps, self.convention = target, num_steps, convention
        self.step_decay, self.depth_sampling, self.seed = step_decay, depth_sampling, seed
        self.position_offset, self.normalization = position_offset, normalization
        self.step_weights = torch.tensor([step_decay**i for i in range(num_steps)], dtype=torch.float64)
        self.tau_steps, self.chunk_slots, self.context = min(tau_steps, num_steps), chunk_slots, context

    @classmethod
    def build(
        cls, target: Target, config: Any, *, seed: int, tau_steps: int, chunk_slots: int | None = None,
        context: ContextGroup = NO_CONTEXT_PARALLELISM,
    ) -> "TTTObjective":  # fmt: skip
        """The objective of a draft's configuration."""
        return cls(
            target,
            **cls.own_arguments(config),
            num_steps=config.ttt_steps,
            step_decay=config.step_decay,
            convention=config.mask_convention,
            normalization=config.normalization,
            depth_sampling=config.depth_sampling,
            position_offset=config.position_offset,
            seed=seed,
            tau_steps=tau_steps,
            chunk_slots=chunk_slots,
            context=context,
        )

    @classmethod
    def own_arguments(cls, config: Any) -> dict[str, Any]:
        """The arguments that a subclass adds to these, from the draft's configuration."""
        return {}

    def schedule(self, batch: Batch, device: torch.device = CPU, training: bool = True) -> Schedule:
        """The schedule of ``batch``, which is on the host; in validation nothing is sampled."""
        # The last step of a slot reads a token, and uses a label, num_steps positions ahead.
        batch = replace(batch, shard=self.context.shard(batch.num_tokens, halo=self.num_steps))
        mask = supervision_mask(batch.loss_mask, batch.documents, self.num_steps, self.convention)
        sampled = training and self.depth_sampling is DepthSampling.geometric
        depths = geometric_depths(batch, self.step_decay, self.seed) if sampled else None
        skips = training and self.position_offset is not None
        position_ids = skipped_positions(batch, self.position_offset or 0, self.seed) if skips else None
        # A sampled slot that reaches a later step weighs 1 there.
        weights = torch.ones_like(self.step_weights) if sampled else self.step_weights
        return make_schedule(batch, mask, depths, self.normalization, weights, device, self.chunk_slots, position_ids)

    def loss(self, draft: Draft, schedule: Schedule, target_output: TargetOutput, counts: torch.Tensor) -> LossSum:
        """The loss of a micro-batch; ``counts`` [T] are those of the global batch, over all ranks and micro-batches."""
        features = self.input_features(draft, schedule, target_output)
        embeddings = draft.embed_input_ids(schedule.input_ids)
        state = compute_step0(draft, embeddings.flatten(0, 1), features.flatten(0, 1), schedule.layout)
        scale = (schedule.step_weights / counts.clamp(min=1e-9)).float().to(features.device, non_blocking=True)

        def chunk_loss(window: Step0State, chunk: SlotChunk) -> tuple[torch.Tensor, Sums]:
            rows = chunk.rows
            outputs = torch.cat(unroll(draft, window, chunk.slots)).index_select(0, rows.output)
            loss, values, correct = self.rows_loss(draft, outputs, target_output, rows, rows.weight * scale[rows.step])
            sums = {name: _sum_by_step(value * rows.weight, rows, self.num_steps) for name, value in values.items()}
            sums["weight"] = _sum_by_step(rows.weight, rows, self.num_steps)
            # One cell more than there are, for the filler.
            cells = torch.zeros(chunk.supervised.numel() + 1, dtype=torch.bool, device=correct.device)
            grid = cells.index_copy_(0, rows.cell, correct)[:-1].view_as(chunk.supervised)
            return loss, sums | chain_sums(grid, chunk.supervised)

        trained = [p for p in draft.parameters() if p.requires_grad]
        return LossSum(*sum_over_chunks(chunk_loss, state, schedule.chunks, trained))

    def input_features(self, draft: Draft, schedule: Schedule, target_output: TargetOutput) -> torch.Tensor:
        """The features that the draft reads: [B, L, h], or of the batch's shard [1, m, h]."""
        return draft.project_hidden_states(target_output.aux_hidden_states, target_output.last_hidden_state)

    def rows_loss(
        self, draft: Any, outputs: torch.Tensor, target_output: TargetOutput, rows: LossRows, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of outputs [M, h], weighted by ``weight`` float32 [M]; returns as :func:`chunked_linear_loss`."""
        hidden, head = target_output.last_hidden_state.flatten(0, 1), draft.head_weight
        return chunked_linear_loss(
            draft.head_input(outputs),
            self.target.logits if head is None else head,
            weight,
            rows.chunks,
            rows.label,
            lambda span: self.labels(draft, hidden.index_select(0, rows.label_positions[span])),
            lambda logits, labels, row_weight: self.row_losses(draft, logits, labels, row_weight),
            len(draft.draft_ids),
        )

    @abstractmethod
    def labels(self, draft: Any, last_hidden_state: torch.Tensor) -> Sequence[torch.Tensor]:
        """The labels of P positions from the target's last hidden states [P, h]: tensors [P, ...]; has no gradient."""

    @abstractmethod
    def row_losses(
        self, draft: Any, logits: torch.Tensor, labels: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> RowLosses:
        """The losses of logits [r, V_d] under ``labels`` [r, ...] and their gradient; may overwrite the logits.

        ``weight``, float32 [r], multiplies the loss of each row in the gradient.
        """

    def metrics(self, sums: Sums) -> dict[str, float]:
        """``loss``, ``ploss_i``, ``acc_i`` for each step, and ``tau`` of a chain of ``tau_steps`` draft tokens."""
        per_step = sums["loss"] / sums["weight"].clamp(min=1e-9)
        accuracy = sums["correct"] / sums["count"].clamp(min=1)
        chain = (sums["chain_correct"] / sums["count"].clamp(min=1))[: self.tau_steps]
        out = {"loss": float((per_step * self.step_weights.to(per_step.device)).sum()), "tau": 1.0 + float(chain.sum())}
        out |= {f"ploss_{i}": float(x) for i, x in enumerate(per_step)}
        return out | {f"acc_{i}": float(x) for i, x in enumerate(accuracy)}


def _sum_by_step(values: torch.Tensor, rows: LossRows, num_steps: int) -> torch.Tensor:
    """float64 [T]: the sums over the rows of each step."""
    zeros = torch.zeros(num_steps, dtype=torch.float64, device=values.device)
    return zeros.index_add_(0, rows.step, values.detach().double())


def chain_sums(correct: torch.Tensor, supervised: torch.Tensor) -> Sums:
    """Numbers of slots supervised at step i for which step i, and the whole chain up to it, is correct.

    Args:
        correct, supervised: bool [T, N].

    Returns:
        float64 [T] each.
    """
    return {
        "count": supervised.sum(1).double(),
        "correct": (correct & supervised).sum(1).double(),
        "chain_correct": (correct.int().cumprod(0).bool() & supervised).sum(1).double(),
    }


@dataclass(frozen=True)
class Step0State:
    """The part of step 0 that is computed at every position of the shard, and read by the slots."""

    tokens: torch.Tensor
    """[m, w]: :meth:`.draft.Draft.project_tokens`."""
    features: torch.Tensor
    """[m, h]"""
    keys_values: tuple[Pair, ...]
    """Keys and values [H_kv, N, d] of each layer, of the whole batch."""
    last_input: torch.Tensor | None
    """[m, h]: the input of the last layer; None: the draft has one layer."""

    def window(self, slots: Slots) -> "Step0State":
        """Views of what ``slots`` read."""
        return Step0State(
            self.tokens[slots.token_window],
            self.features[slots.token_window],
            tuple((k[:, slots.key_window], v[:, slots.key_window]) for k, v in self.keys_values),
            None if self.last_input is None else self.last_input[slots.token_window],
        )

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, always in the same order."""
        last = [] if self.last_input is None else [self.last_input]
        return [self.tokens, self.features, *(x for pair in self.keys_values for x in pair), *last]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Step0State":
        """The state with ``function`` applied to each tensor."""
        return Step0State(
            function(self.tokens),
            function(self.features),
            tuple((function(k), function(v)) for k, v in self.keys_values),
            None if self.last_input is None else function(self.last_input),
        )


def compute_step0(draft: Draft, embeddings: torch.Tensor, features: torch.Tensor, layout: Layout) -> Step0State:
    """The part of step 0 at every position of the shard that slots need; embeddings and features are [m, h]."""
    layers, packed, (_, key_rows) = draft.decoder_layers, pack_qkv(draft), _qkv_rows(draft)
    tokens = draft.project_tokens(embeddings)
    rotation = _rotation(draft, layout.position_ids, features.dtype)
    next_tokens = tokens.roll(-1, dims=0)
    residual, last_input, keys_values = features, None, []
    for n in range(len(layers)):
        # Of the last layer slots need the keys and values only.
        rows = key_rows if n == len(layers) - 1 else slice(None)
        projected, residual = project_qkv(draft, packed, n, next_tokens, residual, rows)
        q, k, v = _split_heads(draft, projected, rotation)
        if layout.sharded:
            k, v = layout.shard.all_gather(k, v)
        keys_values.append((k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()))
        if n < len(layers) - 1:
            attended = unroll_attention(q, keys_values[-1], layout.block, [])
            last_input = residual = layers[n].finish(residual, attended.flatten(1))
    return Step0State(tokens, features, tuple(keys_values), last_input)


def unroll(draft: Draft, state: Step0State, slots: Slots) -> list[torch.Tensor]:
    """The teacher-forced steps of ``slots``, which see all of ``state``.

    Returns:
        Layer outputs [n_i, h] of each step i, of its n_i = ``slots.active[i]`` slots.
    """
    layers, packed, (query_rows, _) = draft.decoder_layers, pack_qkv(draft), _qkv_rows(draft)
    own: list[list[Pair]] = [[] for _ in layers]
    """By layer: the slots' own keys and values of steps 1 … i."""
    outputs: list[torch.Tensor] = []
    for i, active in enumerate(slots.active):
        index = slots.index[:active]
        token = state.tokens.index_select(0, (index + 1 + i).clamp(max=len(state.tokens) - 1))
        rotation = _rotation(draft, slots.position_ids[:active] + i, token.dtype)
        if i == 0:
            # The last layer's queries are all that is left: its keys, and the layers below, are the state's.
            last = len(layers) - 1
            below = state.features if state.last_input is None else state.last_input
            q, residual = project_qkv(draft, packed, last, token, below.index_select(0, index), query_rows)
            q = rotate(q.unflatten(-1, (-1, draft.shape.head_dim)), *rotation)
            attended = unroll_attention(q, state.keys_values[last], slots.blocks[0], [])
            outputs.append(layers[last].finish(residual, attended.flatten(1)))
            continue
        residual = draft.next_feature(outputs[-1])
        if active < len(residual):
            residual = residual[:active]
            own = [[(k[:active], v[:active]) for k, v in pairs] for pairs in own]
        for n, layer in enumerate(layers):
            projected, residual = project_qkv(draft, packed, n, token, residual)
            q, k, v = _split_heads(draft, projected, rotation)
            own[n] = [*own[n], (k, v)]
            attended = unroll_attention(q, state.keys_values[n], slots.blocks[i], own[n])
            residual = layer.finish(residual, attended.flatten(1))
        outputs.append(residual)
    return outputs


def pack_qkv(draft: Draft) -> list[tuple[torch.Tensor, ...]]:
    """The projection weights of each layer, stacked once for all steps; see :func:`project_qkv`."""
    return [draft.pack_first_layer(), *((layer.qkv_weight(),) for layer in draft.decoder_layers[1:])]


def project_qkv(
    draft: Draft, packed: Sequence[tuple[torch.Tensor, ...]], n: int, token: torch.Tensor, below: torch.Tensor,
    rows: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Queries, keys and values of layer n, and its residual.

    The first layer reads the token and the feature ``below``, a deeper one the output ``below`` of the layer below.

    Args:
        token: [n, w], from :meth:`.draft.Draft.project_tokens`.
        below: [n, h].
        rows: the features of [q ; k ; v] that are needed.

    Returns:
        ``rows`` of [n, (H + 2 * H_kv) * d], and [n, h].
    """
    if n == 0:
        return draft.project_first_layer(packed[0], token, below, rows)
    return linear(draft.decoder_layers[n].norm_input(below), packed[n][0][rows]), below


def _qkv_rows(draft: Draft) -> tuple[slice, slice]:
    """The queries, and the keys and values, in the stacked projections."""
    queries = draft.shape.num_heads * draft.shape.head_dim
    return slice(0, queries), slice(queries, None)


def _rotation(draft: Draft, position_ids: torch.Tensor, dtype: torch.dtype) -> Pair:
    """cos and sin [n, 1, d]."""
    cos, sin = draft.rotary(position_ids[None], dtype)
    return cos[0].transpose(0, 1), sin[0].transpose(0, 1)


def _split_heads(
    draft: Draft, projected: torch.Tensor, rotation: Pair
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries (none where they were not projected) and keys, and values: [n, heads, d] each."""
    heads, kv_heads = projected.unflatten(-1, (-1, draft.shape.head_dim)), draft.shape.num_kv_heads
    rotated, values = heads.split((heads.shape[1] - kv_heads, kv_heads), dim=1)
    q, keys = rotate(rotated, *rotation).split((rotated.shape[1] - kv_heads, kv_heads), dim=1)
    return q, keys, values


def sum_over_chunks(
    chunk_loss: Callable[[Step0State, SlotChunk], tuple[torch.Tensor, Sums]],
    state: Step0State,
    chunks: Sequence[SlotChunk],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, Sums]:
    """The sums of ``chunk_loss`` over ``chunks``, with no more than one chunk's activations in memory.

    Chunks share the step-0 state and the weights.  The gradient of a chunk is computed as soon as its loss is known, in
    the forward pass, and added up; nothing is computed twice.  What the state was computed from keeps its graph.

    Args:
        chunk_loss: the loss of a chunk, given its window of ``state``; and other sums.
        weights: the parameters that it reads.

    Returns:
        The loss, a scalar with gradients to ``state`` and ``weights``, and the other sums.
    """
    losses: list[torch.Tensor] = []
    sums: list[Sums] = []
    need_gradient = torch.is_grad_enabled()
    # At least float32: in bfloat16 the small terms of a long sum would vanish.
    totals = state.map(lambda x: torch.zeros_like(x, dtype=_sum_dtype(x))) if need_gradient else state
    weight_totals: list[torch.Tensor | None] = [None for _ in weights]
    for chunk in chunks:
        window = state.window(chunk.slots).map(lambda x: x.detach().requires_grad_(x.requires_grad and need_gradient))
        loss, chunk_sums = chunk_loss(window, chunk)
        losses.append(loss.detach())
        sums.append(chunk_sums)
        if not need_gradient:
            continue
        read = window.tensors()
        inputs = [*read, *weights]
        trained = [x for x in inputs if x.requires_grad]
        computed = iter(torch.autograd.grad(loss, trained, allow_unused=True))
        gradients = [next(computed) if x.requires_grad else None for x in inputs]
        for total, gradient in zip(totals.window(chunk.slots).tensors(), gradients[: len(read)], strict=True):
            if gradient is not None:
                total += gradient
        for n, gradient in enumerate(gradients[len(read) :]):
            if gradient is not None:
                term, before = gradient.to(_sum_dtype(gradient)), weight_totals[n]
                weight_totals[n] = term if before is None else before + term
    total_loss = torch.stack(losses).sum()
    if need_gradient:
        total_loss = attach_gradients(total_loss, [*state.tensors(), *weights], [*totals.tensors(), *weight_totals])
    return total_loss, {name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]}


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
