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
from nemo_speculative.algorithms.common.losses import KnownGradients, RowLosses, chunked_linear_loss, upcast
from nemo_speculative.algorithms.common.schedule import Layout, Schedule, SlotChunk, Slots, make_schedule, step_weights
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.context_parallel import FULL_BATCH, NO_CONTEXT_PARALLELISM, ContextGroup
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
        config: the draft's configuration.
        seed: of the draws of depth sampling, position skips and noise.
        tau_steps: draft tokens of the chain that ``tau`` simulates.
        chunk_slots: slots whose unroll is in memory at once; None: all.
        context: the ranks that share a batch's tokens.
    """

    def __init__(
        self, target: Target, config: Any, *, seed: int, tau_steps: int, chunk_slots: int | None = None,
        context: ContextGroup = NO_CONTEXT_PARALLELISM,
    ):  # fmt: skip
        self.target, self.config, self.seed, self.num_steps = target, config, seed, config.ttt_steps
        self.tau_steps, self.chunk_slots, self.context = min(tau_steps, self.num_steps), chunk_slots, context

    def schedule(self, batch: Batch, device: torch.device = CPU, training: bool = True) -> Schedule:
        """The schedule of ``batch``, which is on the host; in validation nothing is drawn."""
        # The last step of a slot reads a token, and uses a label, num_steps positions ahead.
        batch = replace(batch, shard=self.context.shard(batch.num_tokens, halo=self.num_steps))
        return make_schedule(batch, self.config, self.seed if training else None, device, self.chunk_slots)

    def loss(self, draft: Draft, schedule: Schedule, target_output: TargetOutput, counts: torch.Tensor) -> LossSum:
        """The loss of a micro-batch; ``counts`` [T] are those of the global batch, over all ranks and micro-batches."""
        features = self.input_features(draft, schedule, target_output)
        embeddings = draft.embed_input_ids(schedule.input_ids)
        state = compute_step0(draft, embeddings.flatten(0, 1), features.flatten(0, 1), schedule.layout)
        scale = (schedule.step_weights / counts.clamp(min=1e-9)).float().to(features.device, non_blocking=True)

        def chunk_loss(window: Step0State, rows: SlotChunk) -> tuple[torch.Tensor, Sums]:
            outputs = torch.cat(unroll(draft, window, rows.slots)).index_select(0, rows.output)
            loss, values, correct = self.rows_loss(draft, outputs, target_output, rows, rows.weight * scale[rows.step])
            values = {name: value.detach() * rows.weight for name, value in values.items()} | {"weight": rows.weight}
            zeros = torch.zeros(self.num_steps, dtype=torch.float64, device=correct.device)
            sums = {name: zeros.index_add(0, rows.step, value.double()) for name, value in values.items()}
            # One cell more than there are, for the filler.
            cells = torch.zeros(rows.supervised.numel() + 1, dtype=torch.bool, device=correct.device)
            grid = cells.index_copy_(0, rows.cell, correct)[:-1].view_as(rows.supervised)
            return loss, sums | chain_sums(grid, rows.supervised)

        trained = [p for p in draft.parameters() if p.requires_grad]
        return LossSum(*sum_over_chunks(chunk_loss, state, schedule.chunks, trained))

    def input_features(self, draft: Draft, schedule: Schedule, target_output: TargetOutput) -> torch.Tensor:
        """The features that the draft reads: [B, L, h], or of the batch's shard [1, m, h]."""
        return draft.project_hidden_states(target_output.aux_hidden_states, target_output.last_hidden_state)

    def rows_loss(
        self, draft: Any, outputs: torch.Tensor, target_output: TargetOutput, rows: SlotChunk, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of outputs [M, h], weighted by ``weight`` float32 [M]; returns as :func:`chunked_linear_loss`."""
        hidden, head = target_output.last_hidden_state.flatten(0, 1), draft.head_weight
        return chunked_linear_loss(
            draft.head_input(outputs),
            self.target.logits if head is None else head,
            weight,
            rows.label_chunks,
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
        weights = step_weights(self.config).to(per_step.device)
        out = {"loss": float((per_step * weights).sum()), "tau": 1.0 + float(chain.sum())}
        out |= {f"ploss_{i}": float(x) for i, x in enumerate(per_step)}
        return out | {f"acc_{i}": float(x) for i, x in enumerate(accuracy)}


def chain_sums(correct: torch.Tensor, supervised: torch.Tensor) -> Sums:
    """Numbers of slots supervised at step i for which step i, and the whole chain up to it, is correct.

    Bool [T, N] each → float64 [T] each.
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
    last_input: torch.Tensor
    """[m, h]: the input of the last layer; the features, if the draft has one layer."""
    keys_values: tuple[Pair, ...]
    """Keys and values [H_kv, N, d] of each layer, of the whole batch."""

    def window(self, slots: Slots) -> "Step0State":
        """Views of what ``slots`` read."""
        tokens, keys = slots.token_window, slots.key_window
        pairs = tuple((k[:, keys], v[:, keys]) for k, v in self.keys_values)
        return Step0State(self.tokens[tokens], self.last_input[tokens], pairs)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, always in the same order."""
        return [self.tokens, self.last_input, *(x for pair in self.keys_values for x in pair)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Step0State":
        """The state with ``function`` applied to each tensor."""
        pairs = tuple((function(k), function(v)) for k, v in self.keys_values)
        return Step0State(function(self.tokens), function(self.last_input), pairs)


def compute_step0(draft: Draft, embeddings: torch.Tensor, features: torch.Tensor, layout: Layout) -> Step0State:
    """The part of step 0 at every position of the shard that slots need; embeddings and features are [m, h]."""
    layers, packed = draft.decoder_layers, pack_qkv(draft)
    tokens = draft.project_tokens(embeddings)
    rotation = _rotation(draft, layout.position_ids, features.dtype)
    next_tokens = tokens.roll(-1, dims=0)
    residual = last_input = features
    keys_values = []
    for n in range(len(layers)):
        # Of the last layer slots need the keys and values only.
        rows = slice(_num_queries(draft), None) if n == len(layers) - 1 else slice(None)
        projected, residual = project_qkv(draft, packed, n, next_tokens, residual, rows)
        q, k, v = _split_heads(draft, projected, rotation)
        if layout.shard is not FULL_BATCH:
            k, v = layout.shard.all_gather(k, v)
        keys_values.append((k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()))
        if n < len(layers) - 1:
            attended = unroll_attention(q, keys_values[-1], layout.block, [])
            last_input = residual = layers[n].finish(residual, attended.flatten(1))
    return Step0State(tokens, last_input, tuple(keys_values))


def unroll(draft: Draft, state: Step0State, slots: Slots) -> list[torch.Tensor]:
    """The teacher-forced steps of ``slots``, which see all of ``state``.

    Returns:
        Layer outputs [n_i, h] of each step i, of its n_i = ``slots.active[i]`` slots.
    """
    layers, packed = draft.decoder_layers, pack_qkv(draft)
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
            below, rows = state.last_input.index_select(0, index), slice(_num_queries(draft))
            q, residual = project_qkv(draft, packed, last, token, below, rows)
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
    """The needed ``rows`` of [q ; k ; v] of layer n, [n, (H + 2 * H_kv) * d], and its residual [n, h].

    The first layer reads the token [n, w] and the feature ``below``, a deeper one the output ``below`` [n, h] of the
    layer below.
    """
    if n == 0:
        return draft.project_first_layer(packed[0], token, below, rows)
    return linear(draft.decoder_layers[n].norm_input(below), packed[n][0][rows]), below


def _num_queries(draft: Draft) -> int:
    """The rows of [q ; k ; v] that are queries."""
    return draft.shape.num_heads * draft.shape.head_dim  # type: ignore[no-any-return]


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

    ``chunk_loss`` gives the loss of a chunk and other sums; it reads its window of ``state``, and ``weights``.  The
    scalar that is returned has gradients to both.
    """
    losses: list[torch.Tensor] = []
    sums: list[Sums] = []
    need_gradient = torch.is_grad_enabled()
    # At least float32: in bfloat16 the small terms of a long sum would vanish.
    totals = state.map(lambda x: upcast(torch.zeros_like(x))) if need_gradient else state
    weight_totals: list[torch.Tensor | None] = [None for _ in weights]
    for chunk in chunks:
        window = state.window(chunk.slots).map(lambda x: x.detach().requires_grad_(x.requires_grad and need_gradient))
        loss, chunk_sums = chunk_loss(window, chunk)
        losses.append(loss.detach())
        sums.append(chunk_sums)
        if not need_gradient:
            continue
        pairs = zip(totals.window(chunk.slots).tensors(), window.tensors(), strict=True)
        read = [(total, x) for total, x in pairs if x.requires_grad]
        inputs = [*(x for _, x in read), *weights]
        computed = torch.autograd.grad(loss, inputs, allow_unused=True)
        for (total, _), gradient in zip(read, computed, strict=False):
            if gradient is not None:
                total.add_(gradient)
        for n, gradient in enumerate(computed[len(read) :]):
            if gradient is not None:
                term, before = upcast(gradient), weight_totals[n]
                weight_totals[n] = term if before is None else before + term
    total_loss = torch.stack(losses).sum()
    if need_gradient:
        gradients = [*totals.tensors(), *weight_totals]
        total_loss = KnownGradients.apply(total_loss, gradients, *state.tensors(), *weights)
    return total_loss, {name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]}
