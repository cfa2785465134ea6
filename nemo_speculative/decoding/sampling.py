"""From logits to the distribution that is sampled from, and draws from it."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature first, then top-k, then top-p, each renormalised: the order in which SGLang applies them.

    Raises:
        UserError: a setting out of range.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """The smallest set of the likeliest tokens that holds so much probability stays."""
    top_k: int = 0
    """So many of the likeliest tokens stay; 0: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: expected a number of at least 0 (0 is greedy), e.g. 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: expected a share above 0 and at most 1 (1 is off)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: expected a number of tokens, or 0 for all of them")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of any float dtype → float32 [..., V] that sum to 1."""
        logits = logits.float()
        if self.temperature == 0:
            return one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # Without the maximum, a tiny temperature would overflow.
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        return p if self.top_p == 1 and self.top_k == 0 else self._filtered(p)

    def _filtered(self, p: torch.Tensor) -> torch.Tensor:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        if 0 < self.top_k < p.shape[-1]:
            ordered[..., self.top_k :] = 0
            ordered = ordered / ordered.sum(-1, keepdim=True)
        # A token stays while those before it hold less than top_p, so the likeliest always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)
        return torch.zeros_like(p).scatter(-1, index, ordered / ordered.sum(-1, keepdim=True))


def draw(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One draw from each distribution: [..., V] → int64 [...]."""
    return _race(probabilities, generator).argmax(-1)


def draw_distinct(probabilities: torch.Tensor, k: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """k draws without replacement, in the order drawn: [..., V] → int64 [..., k].

    Where fewer than k tokens have any probability, tokens without any follow them.
    """
    return _race(probabilities, generator).topk(k).indices


def _race(p: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """p_i / E_i with exponential E_i: the order of these is that of successive draws without replacement."""
    exponential = torch.empty_like(p).exponential_(generator=generator)
    return p / exponential.clamp_min(torch.finfo(p.dtype).tiny)
