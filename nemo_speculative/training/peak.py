"""The bytes of tensors at the peak of a training step: the largest of its moments, by part.

docs/scaling.md explains the moments; what each part of a step makes is counted in
:mod:`nemo_speculative.training.cost`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemo_speculative.config.schema import READ_AHEAD, MuonConfig, OptimizerConfig
from nemo_speculative.training.cost import FLOAT32, Amount, DraftCost, TargetCost
from nemo_speculative.training.optimizer import NOT_HIDDEN

CPU_HEAP_SHARE, CPU_HEAP_BYTES = 0.25, 60e6
"""What a CPU's allocator leaves between blocks, as a share of what comes and goes, and libraries take at first use.

Not modelled but calibrated, roughly: ``python -m benchmarks.plan`` on the embedded case, S and M.
"""


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
    ends_divided: bool = False
    """Whether embedding and head are divided as the layers are; each is then whole where it is used."""
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
        ends = self.target.end_parameters * place.target_element * (place.target_share if place.ends_divided else 1.0)
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
        return of_one if self.place.ends_divided and self.place.target_share < 1 else 0.0

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
        place, target_share=0.0, ends_divided=False, target_width=1.0, gathered_layers=0, whole_rows=True,
        ahead=READ_AHEAD,
    )  # fmt: skip
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
