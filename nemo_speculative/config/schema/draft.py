"""The draft networks with their training objectives and losses, and the target's layers and ids that they use."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Optional, Self

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require_positive, require_within
from nemo_speculative.utils.errors import UserError

MaskConvention = StrEnum("MaskConvention", ["serving", "official", "automodel"])
Normalization = StrEnum("Normalization", ["token", "conversation"])
DepthSampling = StrEnum("DepthSampling", ["none", "geometric"])
FeatureNoise = StrEnum("FeatureNoise", ["none", "paper", "official"])


@dataclass
class LossConfig:
    """The loss between the draft's distribution q and the target's p; soft_ce, hard_ce, tv, lk_alpha have no keys."""

    _target_: str = "nemo_speculative.algorithms.common.losses.SoftCrossEntropy"


@dataclass
class KLDivergenceConfig(LossConfig):
    """KL divergence of p from q, both softened by a temperature."""

    _target_: str = "nemo_speculative.algorithms.common.losses.KLDivergence"
    temperature: float = 1.0
    """Softening temperature; above 1, unlikely tokens have more weight."""

    def __post_init__(self) -> None:
        require_within("(0, inf)", self, "draft.loss", "temperature")


@dataclass
class LKLambdaConfig(LossConfig):
    """LK^lambda: moves from KL divergence to total variation as acceptance grows."""

    _target_: str = "nemo_speculative.algorithms.common.losses.LKLambda"
    eta: float = 3.0
    """KL divergence has weight exp(-eta * acceptance); 0: KL divergence alone."""

    def __post_init__(self) -> None:
        require_within("[0, inf)", self, "draft.loss", "eta")


@dataclass(frozen=True)
class VocabularySize:
    """The size of a draft vocabulary."""

    entries: int | None
    """Number of ids; None: as many as ``coverage`` needs."""
    coverage: float = 1.0
    """Share of the supervised tokens, from 0 to 1."""
    own_head: bool = True
    """False: the target's head computes the logits."""


def parse_vocab_size(value: Any, target_vocab_size: int) -> VocabularySize:
    """The draft vocabulary that ``draft.vocab_size`` means for a target; raises UserError if it is not valid."""
    if value == "auto":
        return VocabularySize(min(32000, target_vocab_size))
    if value in ("full", "target_head"):
        return VocabularySize(target_vocab_size, own_head=value == "full")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", str(value))
    if share and 0 < float(share[1]) <= 100:
        return VocabularySize(None, float(share[1]) / 100)
    if type(value) is not int or value <= 0:
        expected = "a number above 0, a coverage such as 99.5%, full, target_head or auto"
        raise UserError(f"draft.vocab_size is {value!r}: expected {expected}")
    if value > target_vocab_size:
        raise UserError(
            f"draft.vocab_size is {value}, larger than the target's vocabulary of {target_vocab_size}: "
            f"set draft.vocab_size={target_vocab_size} or less, or auto"
        )
    return VocabularySize(value)


def aux_layers_for(num_layers: int, chosen: list[int] | None) -> list[int]:
    """The aux layers of a target of ``num_layers`` decoder layers.

    ``chosen``, or the published formula [1, N//2 - 1, N - 4] (EAGLE-3, algorithm as released; 0-based outputs).
    Raises UserError if a layer is out of range, or the formula gives the same layer twice.
    """
    if chosen is None:
        if num_layers < 7:
            spread = sorted({0, max(num_layers // 2 - 1, 0), max(num_layers - 2, 0)})
            raise UserError(
                f"the target has {num_layers} layers, too few for the default aux layers [1, N//2 - 1, N - 4]: list "
                f"them, e.g. draft.aux_layers={spread}"
            )
        return [1, num_layers // 2 - 1, num_layers - 4]
    # SGLang cannot capture the output of the last layer: it reads layer inputs.
    if wrong := [layer for layer in chosen if not 0 <= layer < num_layers - 1]:
        raise UserError(
            f"draft.aux_layers holds {wrong[0]}: the target has {num_layers} layers, so 0 to {num_layers - 2} can be "
            "captured"
        )
    return list(chosen)


@dataclass
class InitFromTarget:
    """Parts of the draft that start from the target's weights instead of random ones."""

    head: bool = True
    """lm_head from the target head's rows."""
    layer: bool = True
    """The decoder layer from the target's last one."""
    fc: bool = True
    """fc as the identity on the highest aux state."""


PUBLISHED_KEYS = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "draft_vocab_size": "vocab_size", "eagle_aux_hidden_state_layer_ids": "aux_layers", "fc_norm": "fc_norm",
    "norm_before_fc": "norm_before_fc", "norm_output": "norm_output",
}  # fmt: skip
"""Keys of a published config.json, and the options that they set; positions and their scaling are the target's."""


@dataclass
class DraftConfig:
    """The draft network and its training objective; a number that is null is the target's."""

    _target_: str = MISSING
    objective: str = MISSING
    """Class of the training objective."""
    config: Optional[str] = None
    """A config.json in the form of EAGLE or SpecForge; its numbers replace those that are null here."""
    init_from: Optional[str] = None
    """Checkpoint to start from, of this project or another."""
    num_layers: Optional[int] = None
    """Decoder layers of the draft; null: 1."""
    intermediate_size: Optional[int] = None
    num_heads: Optional[int] = None
    num_kv_heads: Optional[int] = None
    head_dim: Optional[int] = None
    rope_theta: Optional[float] = None
    """Base of a plain rotary embedding; null: the target's base and scaling."""
    ttt_steps: int = 7
    """Training-time test steps (T): how many tokens the draft drafts from its own outputs in training."""
    step_decay: float = 0.8
    """Step i has weight step_decay ** i in the loss."""
    mask_convention: MaskConvention = MaskConvention.serving
    """Supervised slots: serving: those that inference drafts; official, automodel: as in those frameworks."""
    normalization: Normalization = Normalization.token
    """token: each supervised token has the same weight in the loss; conversation: each conversation has."""
    depth_sampling: DepthSampling = DepthSampling.none
    """geometric: a slot runs step i with probability step_decay ** i and weighs 1 there; same expected gradient."""
    position_offset: Optional[int] = None
    """Largest position id in training: each conversation skips ids at a random place, so that the draft is trained for
    longer contexts than its data has; null: no skips. The target reads the true positions."""
    init_from_target: InitFromTarget = field(default_factory=InitFromTarget)

    def __post_init__(self) -> None:
        require_positive(
            self, "draft", "ttt_steps", "step_decay", "num_layers", "intermediate_size", "num_heads", "num_kv_heads",
            "head_dim", "rope_theta", "position_offset",
        )  # fmt: skip
        if self.init_from is not None and self.rope_theta is not None:
            raise UserError(
                f"draft.rope_theta is {self.rope_theta} and draft.init_from={self.init_from}: a draft keeps the "
                "rotation that it was trained with; leave out draft.rope_theta"
            )
        if self.depth_sampling is DepthSampling.geometric and self.step_decay >= 1:
            raise UserError(
                f"draft.depth_sampling is geometric and draft.step_decay is {self.step_decay}: no slot would be "
                "sampled away; set draft.step_decay below 1, e.g. 0.8, or draft.depth_sampling=none"
            )

    def check_positions(self, max_length: int) -> None:
        """Raises UserError unless position_offset has room for a skip in conversations of ``max_length`` tokens."""
        if self.position_offset is not None and self.position_offset <= max_length:
            raise UserError(
                f"draft.position_offset is {self.position_offset}: expected more than data.max_length={max_length}, "
                "e.g. twice the longest text to be served, or null"
            )

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        """The aux layers of a target with ``num_layers`` layers that the draft reads."""
        return []

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        """The vocabulary of the draft for a target with ``target_vocab_size`` ids."""
        return VocabularySize(target_vocab_size)

    def with_numbers(self, numbers: dict[str, Any], source: str) -> Self:
        """A copy with ``numbers`` where this one has the defaults.

        Raises UserError that names ``source`` if there is no such key, or its value here contradicts it.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, value in numbers.items():
            if name not in defaults:
                raise UserError(f"{source} sets {name}={value!r}, which {type(self).__name__} does not have")
            configured = getattr(self, name)
            if configured not in (defaults[name], value):
                raise UserError(f"draft.{name} is {configured!r}, and {source} says {value!r}; leave out one of them")
        return dataclasses.replace(self, **numbers)

    def with_config_file(self) -> Self:
        """A copy with the numbers of the file ``config``, if any, where this one has the defaults."""
        if self.config is None:
            return self
        file = Path(self.config).expanduser()
        try:
            published = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"draft.config: {file} cannot be read ({error}); expected a draft's config.json") from None
        if not isinstance(published, dict) or "hidden_size" not in published:
            raise UserError(f"draft.config: {file} is not a draft's config.json; expected an object with hidden_size")
        published = {**(published.get("eagle_config") or {}), **published}
        numbers = {option: published.get(key) for key, option in PUBLISHED_KEYS.items()}
        numbers = {option: value for option, value in numbers.items() if value not in (None, False)}
        return self.with_numbers(numbers, f"draft.config ({file})")


@dataclass
class Eagle3DraftConfig(DraftConfig):
    """EAGLE-3; with its switches EAGLE-3.1."""

    _target_: str = "nemo_speculative.algorithms.eagle3.network.Eagle3Draft"
    objective: str = "nemo_speculative.algorithms.eagle3.training.Eagle3Objective"
    hidden_size: Optional[int] = None
    """Width of the draft; if it differs from the target's, the draft trains its own embedding."""
    aux_layers: Optional[list[int]] = None
    """Decoder layers (0-based) whose outputs are the aux hidden states; null: [1, N//2 - 1, N - 4] for N layers."""
    vocab_size: Any = "auto"
    """Size of the draft vocabulary: a number, a coverage such as 99.5%, full, target_head (the target's head computes
    the logits), or auto: 32000, at most the target's."""
    fc_norm: bool = False
    """EAGLE-3.1: RMSNorm of each aux hidden state before fc."""
    norm_before_fc: bool = False
    """One RMSNorm over the concatenated aux hidden states, in place of fc_norm."""
    norm_output: bool = False
    """EAGLE-3.1: the next step reads the hidden state after the final norm."""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "draft", "hidden_size")
        if self.fc_norm and self.norm_before_fc:
            raise UserError("draft.fc_norm and draft.norm_before_fc are both true: two forms of one norm; set one")
        # A server captures them in ascending order, whatever the order of the list.
        if self.aux_layers is not None and (not self.aux_layers or self.aux_layers != sorted(set(self.aux_layers))):
            expected = "distinct layers in ascending order, e.g. [1, 3, 4]"
            raise UserError(f"draft.aux_layers is {self.aux_layers}: expected {expected}")
        parse_vocab_size(self.vocab_size, 1 << 62)

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        return aux_layers_for(num_layers, self.aux_layers)

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        return parse_vocab_size(self.vocab_size, target_vocab_size)


@dataclass
class EagleDraftConfig(DraftConfig):
    """EAGLE-1 and EAGLE-2: autoregression on features, with the target's head."""

    _target_: str = "nemo_speculative.algorithms.eagle.network.EagleDraft"
    objective: str = "nemo_speculative.algorithms.eagle.training.EagleObjective"
    ttt_steps: int = 1
    """Aligned passes over the draft's own features (HASS); EAGLE has 1."""
    vloss_w: float = 1.0
    """Weight of the smooth L1 loss on the target's next feature."""
    ploss_w: float = 0.1
    """Weight of the cross-entropy with the target's distribution."""
    topk_w: float = 0.0
    """Weight of the cross-entropy over the target's topk most likely tokens (HASS uses 1)."""
    topk: int = 10
    noise: FeatureNoise = FeatureNoise.paper
    """Uniform noise on the features read in training: ±0.1 (paper), or that times 512 / length (official code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "draft", "topk")
        require_within("[0, inf)", self, "draft", "vloss_w", "ploss_w", "topk_w")
