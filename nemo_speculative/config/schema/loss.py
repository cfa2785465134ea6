"""The losses between the draft's and the target's distribution."""

import math
from dataclasses import dataclass

from nemo_speculative.config.schema.common import require


@dataclass
class LossConfig:
    """Soft cross-entropy of the draft's distribution q with the target's p."""

    _target_: str = "nemo_speculative.algorithms.common.losses.SoftCrossEntropy"


@dataclass
class HardCrossEntropyConfig(LossConfig):
    """Cross-entropy with the target's most likely token."""

    _target_: str = "nemo_speculative.algorithms.common.losses.HardCrossEntropy"


@dataclass
class KLDivergenceConfig(LossConfig):
    """KL divergence of p from q, both softened by a temperature."""

    _target_: str = "nemo_speculative.algorithms.common.losses.KLDivergence"
    temperature: float = 1.0
    """Softening temperature; above 1, unlikely tokens have more weight."""

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
    """LK^lambda: moves from KL divergence to total variation as acceptance grows."""

    _target_: str = "nemo_speculative.algorithms.common.losses.LKLambda"
    eta: float = 3.0
    """KL divergence has weight exp(-eta * acceptance); 0: KL divergence alone."""

    def __post_init__(self) -> None:
        require(
            0 <= self.eta < math.inf,
            f"draft.loss.eta is {self.eta}: expected a number of at least 0, e.g. 3",
        )
