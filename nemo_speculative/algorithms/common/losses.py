"""Losses between the target's distribution p and the draft's q, over the draft vocabulary.

A loss maps logits [N, V_d], of any floating dtype, and probabilities p float32 [N, V_d] to float32 [N].  It computes in
float32 and reduces over the vocabulary only: what a row weighs is the caller's business.  Every row of p must sum to 1:
a row that is not supervised is weighed by 0, its probabilities are not zeroed.

α = Σ_j min(p_j, q_j) is the probability that a token drawn from q is accepted (2211.17192, section 3.3).
"""

from abc import ABC, abstractmethod

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


class Loss(ABC):
    """See the module's text."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Logits [N, V_d] and probabilities float32 [N, V_d] → float32 [N]."""

    def with_gradient(
        self, logits: torch.Tensor, probabilities: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses float32 [N], and the gradient [N, V_d] of their sum weighed by ``weight`` float32 [N].

        ``choice`` is the argmax of the logits, int64 [N]; the logits may be overwritten.
        """
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            losses = self(logits, probabilities)
            (gradient,) = torch.autograd.grad((losses * weight).sum(), logits)
        return losses.detach(), gradient


class SoftCrossEntropy(Loss):
    """-Σ_j p_j log q_j (EAGLE-3, 2503.01840): the gradient of the KL divergence, without the target's entropy."""

    def with_gradient(
        self, logits: torch.Tensor, probabilities: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        cross = (probabilities * logits).sum(-1)
        q, normaliser = normalised_(logits, choice)
        return normaliser - cross, q.sub_(probabilities).mul_(weight[:, None])

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return -(probabilities * log_softmax(logits.float(), dim=-1)).sum(-1)


class HardCrossEntropy(Loss):
    """-log q of the target's likeliest token: what greedy decoding asks for."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.float(), probabilities.argmax(-1), reduction="none")


class KLDivergence(Loss):
    """T² · KL(p_T ‖ q_T), with p_T ∝ p^(1/T) and q_T = softmax(z / T) (knowledge distillation, 1503.02531, section 2).

    T² keeps the size of the gradient about the same at every temperature.
    """

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        # Of logarithms: a power of p may underflow in a whole row.
        tempered = (probabilities.log() / self.temperature).softmax(-1)
        log_q = log_softmax(logits.float() / self.temperature, dim=-1)
        return self.temperature**2 * kl_div(log_q, tempered, reduction="none").sum(-1)


class TotalVariation(Loss):
    """½ Σ_j |p_j - q_j| = 1 - α: the probability that a drafted token is rejected.

    Its gradient vanishes with the overlap, so it teaches an untrained draft little (2602.23881).
    """

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return 0.5 * (probabilities - logits.float().softmax(-1)).abs().sum(-1)


class LKAlpha(Loss):
    """-log α (LK^α, 2602.23881): total variation's gradient, 1/α as large."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        # Of logarithms: where p and q hardly overlap α underflows, and its gradient with it.
        return -torch.minimum(probabilities.log(), log_softmax(logits.float(), dim=-1)).logsumexp(-1)


class LKLambda(Loss):
    """λ · KL(p ‖ q) + (1 - λ) · TV(p, q), with λ = exp(-η · α) held constant in the gradient (LK^λ, 2602.23881).

    From distillation, while little is accepted, towards acceptance itself.  λ is each row's own: one taken from a mean
    over the batch would make the loss depend on how rows are spread over micro-batches and ranks.
    """

    def __init__(self, eta: float = 3.0):
        self.eta = eta
        self.divergence, self.variation = KLDivergence(), TotalVariation()

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        variation = self.variation(logits, probabilities)
        weight = torch.exp(-self.eta * (1 - variation.detach()))
        return weight * self.divergence(logits, probabilities) + (1 - weight) * variation


def normalised_(logits: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns float32 logits [N, V_d] with argmax ``choice`` int64 [N] into softmax(z); and its normaliser's log [N]."""
    at = choice[:, None]
    top = logits.gather(-1, at)
    q = torch.softmax(logits, -1, out=logits)
    # From one entry of each: torch's logsumexp takes as long as the head's matrix product on a CPU.
    return q, (top - q.gather(-1, at).log())[:, 0]
