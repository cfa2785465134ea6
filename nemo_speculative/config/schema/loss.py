"""What the draft's distribution costs beside the target's."""

import math
from dataclasses import dataclass

from nemo_speculative.config.schema.common import require


@dataclass
class LossConfig:
    """Between the target's distribution p and the draft's q: soft cross-entropy."""

    _target_: str = "nemo_speculative.algorithms.common.losses.SoftCrossEntropy"


@dataclass
class HardCrossEntropyConfig(LossConfig):
    """Cross-entropy against the target's likeliest token."""

    _target_: str = "nemo_speculative.algorithms.common.losses.HardCrossEntropy"


@dataclass
class KLDivergenceConfig(LossConfig):
    """KL divergence of p from q, both softened by a temperature."""

    _target_: str = "nemo_speculative.algorithms.common.losses.KLDivergence"
    temperature: float = 1.0
    """Above 1, unlikely tokens weigh more."""

    def __post_init__(self) -> None:
        require(
            0 < self.temperature < math.inf,
            f"draft.loss.temperature is {self.temperature}: expected a number above 0, e.g. 1",
        )


@dataclass
class TotalVariationConfig(LossConfig):
    """Total variation: the probability that a drafted token is rejected."""

    _target_: str = "nemo_speculative.algorithms.common.losses.TotalVariation"


@dataclass
class LKAlphaConfig(LossConfig):
    """LK^alpha: minus the logarithm of the probability that a drafted token is accepted."""

    _target_: str = "nemo_speculative.algorithms.common.losses.LKAlpha"


@dataclass
class LKLambdaConfig(LossConfig):
    """LK^lambda: from KL divergence towards total variation, the more is accepted."""

    _target_: str = "nemo_speculative.algorithms.common.losses.LKLambda"
    eta: float = 3.0
    """How fast: KL weighs exp(-eta * acceptance); 0 is KL alone."""

    def __post_init__(self) -> None:
        require(
            0 <= self.eta < math.inf,
            f"draft.loss.eta is {self.eta}: expected a number of at least 0, e.g. 3",
        )
