"""What a training step costs, counted: multiply-adds by part, and the bytes of what each part makes.

Everything follows from shapes and from the schedules of real batches, so no model has to run.  A product of [n, a] by
[a, b] is n * a * b multiply-adds; one that is trained through is counted three times (itself, and the gradients of
both factors).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_speculative.algorithms.common.attention import CausalBlock, Piece, PieceBlock
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.losses import LOGITS_PER_BLOCK, LOGITS_PER_CHUNK
from nemo_speculative.algorithms.common.schedule import LABEL_CHUNK, Schedule

FLOAT32 = 4
FORWARD_ATTENTION, BACKWARD_ATTENTION = 2, 5
"""Products over all scores: q k and p v; and with the scores made anew, the gradients of p, v, q and k."""


@dataclass(frozen=True)
class Amount:
    """How much there is to compute in one micro-batch, or on average in several."""

    tokens: float
    """Of the rows, padding included; where ranks share them, of this one's share."""
    all_gather: float
    """Of the rows as a whole: whose keys and values are there."""
    slots: tuple[float, ...]
    """Of each step of the unroll."""
    scores: tuple[float, ...]
    """Pairs of a slot and a step-0 key that are computed at each step, for one head."""
    lower_scores: float
    """The same of a lower layer of a deeper draft, which runs at every position."""
    rows: float
    """Pairs of a slot and a step that carry a loss: logits of the draft."""
    labels: float
    """Positions at which the target's logits are taken."""
    pairs: float
    """Pairs of one of ``tokens`` and a token of its document that it sees: the target's attention."""
    pairs_everywhere: float
    """The same of the rows as a whole."""
    alive: tuple[float, ...]
    """Of ``slots``, those of the largest part: what is alive at once."""
    rows_alive: float
    """Of ``rows``, the same."""
    rows_at_once: float
    """Of ``rows``, those of the largest chunk of labels: whose logits are made together, as far as their limit goes."""
    scores_alive: float
    """Of ``scores``, those of the largest piece."""

    @classmethod
    def of(cls, schedule: Schedule, deeper: bool = False) -> "Amount":
        """Of a schedule on the host; ``deeper``: the draft has several layers."""
        largest = max(schedule.chunks, key=lambda part: sum(part.slots.active))
        layout = schedule.layout
        # The target's own, which the draft need not be told.
        all_gather = layout.host_positions.double() + 1
        pairs = all_gather[layout.shard.to_global(torch.arange(len(layout.position_ids)))]
        return cls(
            tokens=len(schedule.layout.position_ids),
            all_gather=schedule.batch.num_tokens,
            slots=_by_step([part.slots.active for part in schedule.chunks]),
            scores=_by_step([list(map(_scores, part.slots.blocks)) for part in schedule.chunks]),
            lower_scores=_scores(schedule.layout.block) if deeper else 0,
            rows=sum(len(part.rows.output) for part in schedule.chunks),
            labels=sum(len(part.rows.label_positions) for part in schedule.chunks),
            pairs=float(pairs.sum()),
            pairs_everywhere=float(all_gather.sum()),
            alive=_by_step([largest.slots.active]),
            rows_alive=len(largest.rows.output),
            rows_at_once=max(rows.stop - rows.start for part in schedule.chunks for rows, _ in part.rows.chunks),
            scores_alive=max(
                map(_area, (p for part in schedule.chunks for b in part.slots.blocks for p in _pieces(b)))
            ),
        )

    @classmethod
    def mean(cls, amounts: Sequence["Amount"]) -> "Amount":
        """Of several micro-batches; a step that one of them does not reach has no slots in it."""

        def average(name: str) -> Any:
            values = [getattr(amount, name) for amount in amounts]
            if not isinstance(values[0], tuple):
                return sum(values) / len(values)
            return tuple(total / len(values) for total in _by_step(values))

        return cls(**{name: average(name) for name in cls.__dataclass_fields__})

    @property
    def of_whole_rows(self) -> "Amount":
        """What a target has to do that ranks which share rows ask for all of them."""
        return replace(self, tokens=self.all_gather, pairs=self.pairs_everywhere)


def _by_step(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Sums over ``values``, some of which end at an earlier step."""
    return tuple(map(sum, zip_longest(*values, fillvalue=0)))


def _scores(block: CausalBlock) -> int:
    return sum(map(_area, _pieces(block)))


def _pieces(block: CausalBlock) -> Sequence[Piece]:
    assert isinstance(block, PieceBlock)
    return block.pieces


def _area(piece: Piece) -> int:
    return (piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start)


class TargetCost:
    """A frozen target.

    Args:
        model: of transformers, on the meta device.
    """

    def __init__(self, model: Any):
        config, decoder = model.config.get_text_config(), model.get_decoder()
        heads = config.num_attention_heads
        self.parameters = sum(p.numel() for p in model.parameters())
        ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        self.end_parameters = sum(ends.values())
        """Of embedding and head, which cached training needs too."""
        self.hidden, self.vocabulary = config.hidden_size, config.vocab_size
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.head_dim, self.attention_width = head_dim, heads * head_dim
        self.key_width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        self.intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self.layers = config.num_hidden_layers
        self.per_token = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))

    def multiply_adds(self, amount: Amount) -> dict[str, float]:
        """Of a forward pass without the head; of attention what causality leaves of the scores."""
        return {
            "target": amount.tokens * self.per_token,
            "target attention": amount.pairs * self.layers * self.attention_width * FORWARD_ATTENTION,
        }

    def labels(self, amount: Amount) -> dict[str, float]:
        return {"labels": amount.labels * self.vocabulary * self.hidden}

    def forward_bytes(self, amount: Amount, element: int, aux_layers: int, width: float = 1.0) -> float:
        """What is alive at most inside a forward pass: a layer's MLP or attention, beside the states kept so far.

        Args:
            width: how much of a layer's heads and of its MLP is computed here.
        """
        # The embeddings, what the layer reads, plain and normed, and the rotation.
        kept = amount.tokens * ((3 + aux_layers) * self.hidden + 2 * self.head_dim)
        # What is gathered, in its own order and then in the batch's; and a copy for every head of the queries.
        gathered = (amount.all_gather - amount.tokens) * (4 * self.key_width + 2 * self.attention_width)
        attention = width * (amount.tokens * 8 * self.attention_width + gathered)
        mlp = amount.tokens * max(width * 3 * self.intermediate + self.hidden, (aux_layers + 1) * self.hidden)
        return element * (kept + max(mlp, attention))

    def states_bytes(self, amount: Amount, element: int, aux_layers: int) -> float:
        """Aux and last hidden states."""
        return element * amount.tokens * (aux_layers + 1) * self.hidden


class DraftCost:
    """A draft network and the steps of its objective.

    Args:
        draft: on the meta device.
        aux_layers: how many it reads.
        target_hidden: width of the target's states.
    """

    def __init__(self, draft: Draft, *, aux_layers: int, target_hidden: int):
        self.aux_layers, self.target_hidden = aux_layers, target_hidden
        self.parameters = {name: p.numel() for name, p in draft.named_parameters()}
        self.matrices = [name for name, p in draft.named_parameters() if p.ndim == 2]
        self.hidden, self.entries = draft.shape.hidden_size, len(draft.draft_ids)
        self.own_head = draft.head_weight is not None
        layers = list(draft.decoder_layers)
        self.num_layers = len(layers)
        attention, self.head_dim = layers[0].self_attn, layers[0].head_dim
        self.wide, self.narrow = len(attention.q_proj.weight), len(attention.k_proj.weight)
        self.intermediate = draft.shape.intermediate_size
        self.finish = layers[0].self_attn.o_proj.weight.numel() + sum(p.numel() for p in layers[0].mlp.parameters())
        self._probe(draft)

    @property
    def all_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def qkv(self) -> int:
        return self.wide + 2 * self.narrow

    def _probe(self, draft: Draft) -> None:
        """The parts that are a draft's own, counted on one row of nothing."""

        def nothing(width: int) -> torch.Tensor:
            return torch.empty(1, width, device="meta")

        states = nothing(self.aux_layers * self.target_hidden), nothing(self.target_hidden)
        self.read, _ = _products(lambda: draft.project_hidden_states(*states))
        packed = draft.pack_first_layer()
        self.token, token = _products(lambda: draft.project_tokens(nothing(self.hidden)))
        self.token_width = token.shape[1]
        feature = nothing(self.hidden)
        parts = (slice(0, self.wide), slice(self.wide, None), slice(None))
        self.queries, self.keys, self.project = (
            _products(partial(draft.project_first_layer, packed, token, feature, rows))[0] for rows in parts
        )
        self.embedding_trained = any(name.endswith("embed_tokens.weight") for name in self.parameters)

    def multiply_adds(self, amount: Amount) -> dict[str, float]:
        """Of loss and gradient, without the target's labels."""
        below, first, later = self.num_layers - 1, amount.slots[0], sum(amount.slots[1:])
        deeper = self.hidden * self.qkv
        at_all = (self.project + self.finish + (below - 1) * (deeper + self.finish)) if below else 0
        last_keys = 2 * self.narrow * self.hidden if below else self.keys
        last_queries = self.wide * self.hidden if below else self.queries
        of_layer = self.wide * (FORWARD_ATTENTION + BACKWARD_ATTENTION)
        whole = self.project + self.finish + below * (deeper + self.finish)
        layers = first * (last_queries + self.finish) + later * whole
        unrolled = amount.scores[0] + self.num_layers * sum(amount.scores[1:])
        return {
            "fc": 2 * amount.tokens * self.read,
            "tokens": (3 if self.embedding_trained else 2) * amount.tokens * self.token,
            "step-0 keys": 3 * amount.tokens * (at_all + last_keys),
            "layers": 3 * layers,
            "attention": (unrolled + below * amount.lower_scores) * of_layer,
            "head": (3 if self.own_head else 2) * amount.rows * self.entries * self.hidden,
        }

    def kept_bytes(self, amount: Amount, element: int) -> float:
        """What the gradient of the largest part needs, when its outputs are there; the target's states apart."""
        h, keys_values = self.hidden, 2 * self.narrow
        # Embeddings and features, plain and normed; keys and values; and of lower layers all that a step keeps.
        at_all = 4 * h + keys_values + (self.num_layers - 1) * (self._of_layer(element, 0) + keys_values)
        kept = amount.tokens * at_all + self._gathered(amount) + self._of_steps(amount.alive, element)
        return element * (kept + amount.rows_alive * 2 * h)

    def prefix_bytes(self, amount: Amount) -> float:
        """The gradient of what the slots of all parts read, as far as parts are done."""
        deeper = self.hidden if self.num_layers > 1 else 0
        read = self.token_width + self.hidden + self.num_layers * 2 * self.narrow + deeper
        return FLOAT32 * (amount.tokens * read + self._gathered(amount))

    def backward_bytes(self, amount: Amount) -> float:
        """What the backward pass of the largest part adds: its gradient of the prefix, and of a piece of the attention
        probabilities and their gradient."""
        return self.prefix_bytes(amount) + 2 * FLOAT32 * self.wide / self.head_dim * amount.scores_alive

    def _gathered(self, amount: Amount) -> float:
        """Entries of the other ranks' keys and values."""
        return (amount.all_gather - amount.tokens) * self.num_layers * 2 * self.narrow

    def _of_steps(self, slots: Sequence[float], element: int) -> float:
        first = slots[0] * (2 * self.hidden + self._behind_projection(element) - self.wide)
        return first + self.num_layers * sum(n * self._of_layer(element, i + 1) for i, n in enumerate(slots[1:], 1))

    def _of_layer(self, element: int, parts: int) -> float:
        """Entries of a row of a layer whose attention joins ``parts``; projections, rotated and with their rotation."""
        projected = self.qkv + self.wide + self.narrow + 2 * self.head_dim
        weights = parts * self.wide / self.head_dim * FLOAT32 / element
        return self.hidden + projected + weights + self._behind_projection(element)

    def _behind_projection(self, element: int) -> float:
        attention = 4 * self.wide + self.wide / self.head_dim * FLOAT32 / element  # q, output twice, joined; lse
        # The sum with the residual, its norm, the output; gate and up.
        return attention + 3 * self.hidden + 2 * self.intermediate

    def logits_bytes(self, amount: Amount, vocabulary: int, element: int, device_type: str) -> float:
        """A chunk of logits, what is judged of it at once, and a chunk of labels."""
        whole = amount.rows_at_once * self.entries
        chunk, judged = min(whole, LOGITS_PER_CHUNK[device_type]), 3 * min(whole, LOGITS_PER_BLOCK[device_type])
        labels = LABEL_CHUNK[device_type] * (vocabulary * element + self.entries * 2 * FLOAT32)
        return chunk * element + judged * FLOAT32 + labels

    def head_bytes(self) -> int:
        """The head's gradient, which is made in the forward pass."""
        return self.entries * self.hidden * FLOAT32 if self.own_head else 0


def _products(run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-adds of ``run``, and what it returned."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() // 2, result
