"""What a training step costs, counted: multiply-adds by part, and bytes by part.

Everything follows from shapes and from the schedules of real batches, so no model has to run.  A product of [n, a] by
[a, b] is n * a * b multiply-adds; one that is trained through is counted three times (itself, and the gradients of
both factors).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_speculative.config.schema import READ_AHEAD, MuonConfig, OptimizerConfig
from nemo_speculative.drafts.attention import Block, Piece, PieceBlock
from nemo_speculative.drafts.base import Draft
from nemo_speculative.drafts.unroll import EVERYTHING, Entry
from nemo_speculative.objectives.head import LOGITS_ALIVE, LOGITS_JUDGED
from nemo_speculative.objectives.schedule import LABEL_CHUNK, Schedule
from nemo_speculative.training.optimization import NOT_HIDDEN

FLOAT32 = 4
FORWARD_ATTENTION, BACKWARD_ATTENTION = 2, 5
"""Products over all scores: q k and p v; and with the scores made anew, the gradients of p, v, q and k."""

CPU_HEAP_SHARE, CPU_HEAP_BYTES = 0.25, 60e6
"""What a CPU's allocator leaves between blocks, as a share of what comes and goes, and libraries take at first use.

Not modelled but calibrated, roughly: ``python -m benchmarks.plan`` on the embedded case, S and M.
"""


@dataclass(frozen=True)
class Amount:
    """How much there is to compute in one micro-batch, or on average in several."""

    tokens: float
    """Of the rows, padding included; where ranks share them, of this one's share."""
    everywhere: float
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
        largest = max(schedule.parts, key=lambda part: sum(part.slots.alive))
        layout = schedule.layout
        # The target's own, which the draft need not be told.
        everywhere = layout.host_positions.double() + 1
        pairs = everywhere[layout.share.flat(torch.arange(len(layout.positions)))]
        return cls(
            tokens=len(schedule.layout.positions),
            everywhere=schedule.batch.num_tokens,
            slots=_by_step([part.slots.alive for part in schedule.parts]),
            scores=_by_step([list(map(_scores, part.slots.blocks)) for part in schedule.parts]),
            lower_scores=_scores(schedule.layout.block) if deeper else 0,
            rows=sum(len(part.rows.output) for part in schedule.parts),
            labels=sum(len(part.rows.labels) for part in schedule.parts),
            pairs=float(pairs.sum()),
            pairs_everywhere=float(everywhere.sum()),
            alive=_by_step([largest.slots.alive]),
            rows_alive=len(largest.rows.output),
            rows_at_once=max(rows.stop - rows.start for part in schedule.parts for rows, _ in part.rows.chunks),
            scores_alive=max(map(_area, (p for part in schedule.parts for b in part.slots.blocks for p in _pieces(b)))),
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
        return replace(self, tokens=self.everywhere, pairs=self.pairs_everywhere)


def _by_step(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Sums over ``values``, some of which end at an earlier step."""
    return tuple(map(sum, zip_longest(*values, fillvalue=0)))


def _scores(block: Block) -> int:
    return sum(map(_area, _pieces(block)))


def _pieces(block: Block) -> Sequence[Piece]:
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
        gathered = (amount.everywhere - amount.tokens) * (4 * self.key_width + 2 * self.attention_width)
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
        layers = list(draft.stack)
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
        self.read, _ = _products(lambda: draft.read(*states))
        entry = draft.entry()
        self.token, token = _products(lambda: entry.token(nothing(self.hidden)))
        self.token_width = token.shape[1]
        feature = nothing(self.hidden)
        parts = (slice(0, self.wide), slice(self.wide, None), EVERYTHING)
        self.queries, self.keys, self.project = (
            _products(partial(_projected, entry, token, feature, rows))[0] for rows in parts
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
        return (amount.everywhere - amount.tokens) * self.num_layers * 2 * self.narrow

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
        chunk, judged = min(whole, LOGITS_ALIVE[device_type]), 3 * min(whole, LOGITS_JUDGED[device_type])
        labels = LABEL_CHUNK[device_type] * (vocabulary * element + self.entries * 2 * FLOAT32)
        return chunk * element + judged * FLOAT32 + labels

    def head_bytes(self) -> int:
        """The head's gradient, which is made in the forward pass."""
        return self.entries * self.hidden * FLOAT32 if self.own_head else 0


def _projected(entry: Entry, token: torch.Tensor, feature: torch.Tensor, rows: slice) -> torch.Tensor:
    return entry.project(token, feature, rows)[0]


def _products(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Multiply-adds of ``run``, and what it returned."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() // 2, result


@dataclass(frozen=True)
class Placement:
    """How a job's tensors lie on a device."""

    ranks: int
    shards: int
    target_element: int
    """Bytes of an entry."""
    element: int
    """Of what the draft computes in."""
    device_type: str
    target_share: float = 1.0
    """Of the target's layers, what lies here: with a target elsewhere, or on disk, nothing."""
    ends_share: float = 1.0
    """Of its embedding and its head; where it is a part, one is whole where it is used."""
    target_width: float = 1.0
    """Of each layer, what is computed here: with tensor parallelism a part, for one rank's rows after the other's."""
    gathered_layers: int = 0
    """Of the target's, whole, while it computes."""
    whole_rows: bool = False
    """Whether the target computes, or is read, as whole rows, also where ranks share them."""
    ahead: int = 0
    """Micro-batches whose states are there, or on their way, while the draft works on one."""
    accumulates: bool = True
    """Whether the gradients of earlier micro-batches wait."""
    offloaded: bool = False
    """Whether the draft's shards, their gradients and moments are in a memory of their own, the host's."""

    @property
    def wrapped(self) -> bool:
        """FSDP holds shards in float32, and a whole copy to compute with."""
        return self.ranks > 1 or self.element < FLOAT32 or self.offloaded


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one device at the peak of a step, by part."""

    parts: dict[str, float]
    cached: float | None
    """Of a step that reads its features instead; None: the target computes nothing here."""
    besides: float = 0.0
    """What the process holds that is no tensor, roughly."""

    @property
    def online(self) -> float:
        return sum(self.parts.values())


Parts = dict[str, float]


@dataclass(frozen=True)
class _Moments:
    """What is alive at each moment of a step that may be its peak, on its largest micro-batch."""

    target: TargetCost
    draft: DraftCost
    largest: Amount
    optimizer: OptimizerConfig
    place: Placement

    def peak(self) -> Parts:
        """Bytes by part."""
        return max(self, key=lambda parts: sum(parts.values()))

    def __iter__(self) -> Iterator[Parts]:
        yield self._target_computes(first=True)
        if self.place.accumulates:
            yield self._target_computes(first=False)
        if not self.draft.embedding_trained:
            yield self._embeds()
        yield self._head()
        yield self._backward()
        if self.place.wrapped:
            yield self._exchange()

    def _target_computes(self, first: bool) -> Parts:
        """Before the first micro-batch of a step the draft's weights are on their way; later gradients wait."""
        place = self.place
        # What arrives, and what it is gathered in.
        copies = 2 * self._copy * (place.shards > 1) if first else self._copy
        states = self._waiting + (0.0 if place.ahead else self._forward)
        if place.target_width < 1:  # this rank's own, while the others' are computed
            states += self.target.states_bytes(self._seen, place.target_element, self.draft.aux_layers)
        return self._parts(copies, 0.0 if first else self._gradients, states, whole_ends=0)

    def _embeds(self) -> Parts:
        """The draft reads its tokens, from the target's embedding."""
        embedded = self.largest.tokens * self.target.hidden * self.place.target_element
        return self._draft_has_its_turn(kept=embedded, whole_ends=1 + self._while_gathered)

    def _head(self) -> Parts:
        """The last part's outputs are judged."""
        kept = self.draft.kept_bytes(self.largest, self.place.element) + self.draft.prefix_bytes(self.largest)
        logits = self.draft.logits_bytes(
            self.largest, self.target.vocabulary, self.place.target_element, self.place.device_type
        )
        return self._draft_works(kept=kept, logits=logits + self.draft.head_bytes())

    def _backward(self) -> Parts:
        """Its gradient is taken."""
        kept = self.draft.kept_bytes(self.largest, self.place.element) + self.draft.prefix_bytes(self.largest)
        kept += self.draft.backward_bytes(self.largest)
        return self._draft_works(kept=kept, gradients=self.draft.all_parameters * self.place.element)

    def _draft_works(self, kept: float, gradients: float = 0.0, logits: float = 0.0) -> Parts:
        # Of one part the gradient of all weights; their sum is float32 and whole, also where FSDP shards it afterwards.
        several = sum(self.largest.slots) > sum(self.largest.alive)
        return self._draft_has_its_turn(kept, gradients + self._gradients * several, logits)

    def _draft_has_its_turn(
        self, kept: float, gradients: float = 0.0, logits: float = 0.0, whole_ends: int = 1
    ) -> Parts:  # fmt: skip
        gradients += self._gradients * self.place.accumulates
        beside = self._forward if self.place.ahead else 0.0
        return self._parts(self._copy, gradients, self._states + beside + self._waiting, kept, logits, whole_ends)

    def _exchange(self) -> Parts:
        """Behind the last micro-batch: gradients, what they are sent from, and this rank's part of their sum."""
        made = self.draft.all_parameters * (FLOAT32 if self.place.accumulates else self.place.element)
        summed = self._gradients / self.place.shards
        return self._parts(gradients=made + self._gradients + summed, states=self._states + self._waiting)

    def _parts(
        self, copies: float = 0.0, gradients: float = 0.0, states: float = 0.0, kept: float = 0.0, logits: float = 0.0,
        whole_ends: int = 1,
    ) -> Parts:  # fmt: skip
        """``whole_ends``: how many of embedding and head are gathered, where they are divided."""
        place, own = self.place, 0.0 if self.place.offloaded else 1 / self.place.shards
        ends = self.target.end_parameters * place.target_element * place.ends_share
        return {
            "target": ends + self._layers * place.target_share + whole_ends * self._gathered_end,
            "draft": self._gradients * own + copies,
            "gradients and moments": _moments_bytes(self.draft, self.optimizer) * own + gradients,
            "target's states": states,
            "activations": kept,
            "logits": logits,
        }

    @property
    def _gathered_end(self) -> float:
        """An embedding or a head, whole beside the part of it that is always here."""
        of_one = self.target.vocabulary * self.target.hidden * self.place.target_element
        return of_one if self.place.ends_share < 1 else 0.0

    @property
    def _while_gathered(self) -> int:
        """How often an end is there as it arrives: gloo, a CPU's exchange, puts it together in a buffer of its own."""
        return 2 if self.place.device_type == "cpu" else 1

    @property
    def _layers(self) -> float:
        return (self.target.parameters - self.target.end_parameters) * self.place.target_element

    @property
    def _gradients(self) -> float:
        """Of all weights, in float32: as much as the weights."""
        return self.draft.all_parameters * FLOAT32

    @property
    def _copy(self) -> float:
        """The weights to compute with, where they are not the draft's own."""
        return self.draft.all_parameters * self.place.element * self.place.wrapped

    @property
    def _seen(self) -> Amount:
        return self.largest.of_whole_rows if self.place.whole_rows else self.largest

    @property
    def _forward(self) -> float:
        """Of the target; where its layers are gathered one by one, the embedding goes before."""
        place = self.place
        if not place.target_share:
            return 0.0
        made = self.target.forward_bytes(self._seen, place.target_element, self.draft.aux_layers, place.target_width)
        whole = self._layers * place.gathered_layers / self.target.layers
        return max(made + (whole or self._gathered_end), self._while_gathered * self._gathered_end)

    @property
    def _states(self) -> float:
        """Of the micro-batch that the draft is at work on; the aux states also as it reads them."""
        own = self.target.states_bytes(self.largest, self.place.target_element, self.draft.aux_layers)
        if self.place.element != self.place.target_element:
            own += self.largest.tokens * self.draft.aux_layers * self.target.hidden * self.place.element
        return own

    @property
    def _waiting(self) -> float:
        """Of the micro-batches ahead."""
        return self.place.ahead * self.target.states_bytes(
            self.largest, self.place.target_element, self.draft.aux_layers
        )


def step_memory(
    target: TargetCost, draft: DraftCost, largest: Amount, optimizer: OptimizerConfig, place: Placement
) -> Memory:
    """The peak of a step whose largest micro-batch is ``largest``."""
    parts = _Moments(target, draft, largest, optimizer, place).peak()
    read = replace(
        place, target_share=0.0, ends_share=1.0, target_width=1.0, gathered_layers=0, whole_rows=True, ahead=READ_AHEAD
    )
    cached = sum(_Moments(target, draft, largest, optimizer, read).peak().values()) if place.target_share else None
    passing = sum(parts[name] for name in ("target's states", "activations", "logits"))
    besides = CPU_HEAP_SHARE * passing + CPU_HEAP_BYTES if place.device_type == "cpu" else 0.0
    return Memory(parts, cached, besides)


def _moments_bytes(draft: DraftCost, config: OptimizerConfig) -> int:
    """Two float32 moments of every entry, one where Muon is; and the average of the weights, where there is one."""
    momenta = 2 * draft.all_parameters
    if isinstance(config, MuonConfig):
        momenta -= sum(draft.parameters[name] for name in draft.matrices if not name.endswith(NOT_HIDDEN))
    return FLOAT32 * (momenta + (0 if config.ema_decay is None else draft.all_parameters))
