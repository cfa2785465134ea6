"""The draft networks, with their training objectives."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive
from nemo_speculative.config.schema.loss import LossConfig
from nemo_speculative.config.vocab_and_aux_layers import VocabularySize, aux_layers_for, parse_vocab_size


class MaskConvention(Enum):
    serving = "serving"
    official = "official"
    automodel = "automodel"


class Normalization(Enum):
    token = "token"
    conversation = "conversation"


class DepthSampling(Enum):
    none = "none"
    geometric = "geometric"


class FeatureNoise(Enum):
    none = "none"
    paper = "paper"
    official = "official"


@dataclass
class InitFromTarget:
    """Which parts of the draft start from the target's weights instead of random ones."""

    head: bool = True
    """lm_head from the target head's rows."""
    layer: bool = True
    """The decoder layer from the target's last one."""
    fc: bool = True
    """fc as the identity on the highest aux state."""


@dataclass
class DraftConfig:
    """The draft network and its training objective; every number that is null is the target's."""

    _target_: str = MISSING
    objective: str = MISSING
    """The class of the loss."""
    config: Optional[str] = None
    """A draft's config.json in the published EAGLE or SpecForge form: its numbers fill what is null here."""
    init_from: Optional[str] = None
    """A draft to start from: a checkpoint of this project, or another project's."""
    num_layers: Optional[int] = None
    """Decoder layers of the draft; null: 1."""
    intermediate_size: Optional[int] = None
    num_heads: Optional[int] = None
    num_kv_heads: Optional[int] = None
    head_dim: Optional[int] = None
    rope_theta: Optional[float] = None
    """Base of a plain rotary embedding of the draft's own; null: the target's, with its scaling."""
    ttt_steps: int = 7
    """Steps of the unroll in training (T)."""
    step_decay: float = 0.8
    """Step i weighs step_decay ** i in the loss."""
    mask_convention: MaskConvention = MaskConvention.serving
    """Which slots are supervised: serving is what inference asks for; official and automodel as those frameworks do."""
    normalization: Normalization = Normalization.token
    """What weighs the same in the loss: every supervised token, or every conversation."""
    depth_sampling: DepthSampling = DepthSampling.none
    """geometric: a slot runs step i with probability step_decay ** i and weighs 1 there; same expected gradient."""
    position_offset: Optional[int] = None
    """In training every document skips positions at a random place, up to this one, so that the draft meets longer
    distances than its documents have; null: no skips. The target reads the true positions."""
    init_from_target: InitFromTarget = field(default_factory=InitFromTarget)

    def __post_init__(self) -> None:
        require_positive(
            self, "draft", "ttt_steps", "step_decay", "num_layers", "intermediate_size", "num_heads", "num_kv_heads",
            "head_dim", "rope_theta", "position_offset",
        )  # fmt: skip
        require(
            self.init_from is None or self.rope_theta is None,
            f"draft.rope_theta is {self.rope_theta} and draft.init_from={self.init_from}: a draft keeps the rotation "
            "that it was trained with; leave out draft.rope_theta",
        )
        require(
            self.depth_sampling is DepthSampling.none or self.step_decay < 1,
            f"draft.depth_sampling is geometric and draft.step_decay is {self.step_decay}: no slot would be sampled "
            "away; set draft.step_decay below 1, e.g. 0.8, or draft.depth_sampling=none",
        )

    def check_positions(self, max_length: int) -> None:
        """Documents of ``max_length`` tokens leave room for a skip.

        Raises:
            UserError: they do not.
        """
        require(
            self.position_offset is None or self.position_offset > max_length,
            f"draft.position_offset is {self.position_offset}: expected more than data.max_length={max_length}, e.g. "
            "twice the longest text to be served, or null",
        )

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        """The aux layers that it reads of a target of ``num_layers`` layers."""
        return []

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        """How many ids of a target of ``target_vocab_size`` it can propose."""
        return VocabularySize(target_vocab_size)


@dataclass
class Eagle3DraftConfig(DraftConfig):
    """EAGLE-3, and EAGLE-3.1 by its three switches."""

    _target_: str = "nemo_speculative.algorithms.eagle3.network.Eagle3Draft"
    objective: str = "nemo_speculative.algorithms.eagle3.training.Eagle3Objective"
    hidden_size: Optional[int] = None
    """Where it is not the target's, the draft trains an embedding of its own."""
    aux_layers: Optional[list[int]] = None
    """Decoder layers (0-based) whose outputs are the aux hidden states; null: [1, N//2 - 1, N - 4] for N layers."""
    vocab_size: Any = "auto"
    """Of the draft: a number, a coverage such as 99.5%, full, target_head (no head of its own), or auto: 32000, or the
    whole target vocabulary where that is smaller."""
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm over each aux state before fc."""
    norm_before_fc: bool = False
    """The other form: one RMSNorm over all aux states together."""
    norm_output: bool = False
    """EAGLE-3.1: the next step is fed the state after the final norm."""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "draft", "hidden_size")
        require(
            not (self.fc_norm and self.norm_before_fc),
            "draft.fc_norm and draft.norm_before_fc are both true: they are two forms of one norm; set one of them",
        )
        if self.aux_layers is not None:
            # A server captures them in this order, whatever the order of the list.
            ascending = self.aux_layers == sorted(set(self.aux_layers))
            require(
                bool(self.aux_layers) and ascending,
                f"draft.aux_layers is {self.aux_layers}: expected distinct layers in ascending order, e.g. [1, 3, 4]",
            )
        parse_vocab_size(self.vocab_size, 1 << 62)

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        return aux_layers_for(num_layers, self.aux_layers)

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        return parse_vocab_size(self.vocab_size, target_vocab_size)


@dataclass
class EagleDraftConfig(DraftConfig):
    """EAGLE-1 and EAGLE-2: feature autoregression under the target's own head."""

    _target_: str = "nemo_speculative.algorithms.eagle.network.EagleDraft"
    objective: str = "nemo_speculative.algorithms.eagle.training.EagleObjective"
    ttt_steps: int = 1
    """Aligned passes over the draft's own features (HASS); 1 is EAGLE's."""
    vloss_w: float = 1.0
    """Weight of the regression of the target's next feature (smooth L1)."""
    ploss_w: float = 0.1
    """Weight of the cross-entropy between the two distributions."""
    topk_w: float = 0.0
    """Weight of the cross-entropy over the target's topk likeliest tokens (HASS uses 1)."""
    topk: int = 10
    noise: FeatureNoise = FeatureNoise.paper
    """Uniform noise on the features read in training: ±0.1 (paper), or that times 512 / length (official code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "draft", "topk")
        require_not_negative(self, "draft", "vloss_w", "ploss_w", "topk_w")
