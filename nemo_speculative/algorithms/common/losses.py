"""Losses between the target's distribution p and the draft's q, and their evaluation under the output head, in chunks.

A loss maps logits [r, V_d], of any floating dtype, and probabilities p float32 [r, V_d] to float32 [r].  It computes in
float32 and reduces over the vocabulary only; the caller weights the rows.  Every row of p must sum to 1: an
unsupervised row has weight 0, its probabilities are not zeroed.

α = Σ_j min(p_j, q_j) is the probability that a token drawn from q is accepted (2211.17192, section 3.3).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that exist at once: as few as a matrix product needs to run at full speed."""
LOGITS_PER_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits of a chunk whose loss is computed at once: on a CPU as many as stay in the cache."""


def upcast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Loss(ABC):
    """A loss between two distributions; see the module's text."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Logits [r, V_d] and probabilities float32 [r, V_d] → float32 [r]."""

    def with_gradient(
        self, logits: torch.Tensor, probabilities: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses float32 [r], and the gradient [r, V_d] of their sum weighted by ``weight`` float32 [r].

        ``choice`` is the argmax of the logits, int64 [r]; the logits may be overwritten.
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
        logits = upcast(logits)
        expected = (probabilities * logits).sum(-1)
        q, log_normalizer = normalize_(logits, choice)
        return log_normalizer - expected, q.sub_(probabilities).mul_(weight[:, None])

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return -(probabilities * log_softmax(upcast(logits), dim=-1)).sum(-1)


class HardCrossEntropy(Loss):
    """-log q of the target's most likely token, the one that greedy decoding emits."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return cross_entropy(upcast(logits), probabilities.argmax(-1), reduction="none")


@dataclass(frozen=True)
class KLDivergence(Loss):
    """T² · KL(p_T ‖ q_T), with p_T ∝ p^(1/T) and q_T = softmax(z / T) (knowledge distillation, 1503.02531, section 2).

    T² keeps the size of the gradient about the same at every temperature.
    """

    temperature: float = 1.0

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        # In logarithms: a power of p may underflow in a whole row.
        tempered = (probabilities.log() / self.temperature).softmax(-1)
        log_q = log_softmax(upcast(logits) / self.temperature, dim=-1)
        return self.temperature**2 * kl_div(log_q, tempered, reduction="none").sum(-1)


class TotalVariation(Loss):
    """½ Σ_j |p_j - q_j| = 1 - α: the probability that a drafted token is rejected.

    Its gradient vanishes with the overlap, so it teaches an untrained draft little (2602.23881).
    """

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return 0.5 * (probabilities - upcast(logits).softmax(-1)).abs().sum(-1)


class LKAlpha(Loss):
    """-log α (LK^α, 2602.23881): total variation's gradient, scaled by 1/α."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        # In logarithms: where p and q hardly overlap α underflows, and its gradient with it.
        return -torch.minimum(probabilities.log(), log_softmax(upcast(logits), dim=-1)).logsumexp(-1)


@dataclass(frozen=True)
class LKLambda(Loss):
    """λ · KL(p ‖ q) + (1 - λ) · TV(p, q), with λ = exp(-η · α) held constant in the gradient (LK^λ, 2602.23881).

    Moves from distillation, while little is accepted, towards acceptance itself.  λ belongs to each row: a λ from a
    mean over the batch would make the loss depend on how rows are spread over micro-batches and ranks.
    """

    eta: float = 3.0

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        variation = TotalVariation()(logits, probabilities)
        weight = torch.exp(-self.eta * (1 - variation.detach()))
        return weight * KLDivergence()(logits, probabilities) + (1 - weight) * variation


def normalize_(logits: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(z) in place of logits z [r, V_d] with argmax ``choice`` int64 [r], and logsumexp(z) [r]."""
    at = choice[:, None]
    top = logits.gather(-1, at)
    q = torch.softmax(logits, -1, out=logits)
    # From one entry of each row: torch's logsumexp takes as long as the head's matrix product on a CPU.
    return q, (top - q.gather(-1, at).log())[:, 0]


class RowLosses(NamedTuple):
    """The losses of r rows."""

    values: dict[str, torch.Tensor]
    """float32 [r] each, unweighted: ``loss`` is minimized, other entries are its terms, for the metrics."""
    correct: torch.Tensor
    """bool [r]: the draft's argmax is the target's."""
    gradient: torch.Tensor
    """[r, V_d]: d (Σ weight · loss) / d logits."""


def chunked_linear_loss(
    states: torch.Tensor,
    head: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
    row_weight: torch.Tensor,
    chunks: Sequence[tuple[slice, slice]],
    label_index: torch.Tensor,
    make_labels: Callable[[slice], Sequence[torch.Tensor]],
    row_losses: Callable[[torch.Tensor, list[torch.Tensor], torch.Tensor], RowLosses],
    vocab_size: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The weighted sum of the losses of M rows under the output head, one chunk of logits after the other.

    The loss is a sum over rows, so a chunk's gradient is known as soon as its logits are: it is computed in the forward
    pass and takes the place of the logits.  Never more than a chunk of logits exists, and nothing is computed twice.

    Args:
        states, row_weight: [M, h], the inputs of the head, and float32 [M].
        head: its trained weight [V_d, h], or the frozen head as a function [r, h] → [r, V_d].
        chunks: pairs of a slice of the rows and the slice of the labels that these rows use.
        label_index: int64 [M], the label of each row.
        make_labels: a slice of the labels → the tensors, of one entry per label, that describe them.
        row_losses: logits, those tensors with one entry per row, row weights → losses; may overwrite the logits.

    Returns:
        The loss, a scalar with gradients to ``states`` and a trained ``head``; the values [M] of its terms; bool [M],
        whether the draft's argmax is the target's.
    """
    trained = head if isinstance(head, torch.Tensor) else None
    inputs = [states] if trained is None else [states, trained]
    need_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chunk_rows, block_rows = (
        max(limit[states.device.type] // vocab_size // 64 * 64, 64) for limit in (LOGITS_PER_CHUNK, LOGITS_PER_BLOCK)
    )
    values: list[dict[str, torch.Tensor]] = []
    correct: list[torch.Tensor] = []
    with torch.no_grad():
        gradients = [torch.empty_like(states)] if need_gradient else []
        if trained is not None:
            # One buffer for all chunks: fresh memory pages cost a CPU as much as filling them.
            buffer = trained.new_empty(min(max(rows.stop - rows.start for rows, _ in chunks), chunk_rows), len(trained))
            if need_gradient:
                gradients.append(torch.zeros_like(trained, dtype=torch.promote_types(trained.dtype, torch.float32)))
        for rows, span in chunks:
            labels = make_labels(span)
            for piece in _slices(rows, chunk_rows):
                x = states[piece]
                if trained is not None:
                    logits = torch.mm(x, trained.T, out=buffer[: len(x)])
                else:
                    with torch.set_grad_enabled(need_gradient):
                        x = x.detach().requires_grad_(need_gradient)
                        frozen_logits = head(x)  # type: ignore[operator]
                    logits = frozen_logits.detach().clone() if need_gradient else frozen_logits
                for block in _slices(piece, block_rows):
                    part = logits[block.start - piece.start : block.stop - piece.start]
                    index = label_index[block] - span.start
                    result = row_losses(part, [tensor.index_select(0, index) for tensor in labels], row_weight[block])
                    if result.gradient.data_ptr() != part.data_ptr():
                        part.copy_(result.gradient)
                    values.append(result.values)
                    correct.append(result.correct)
                if need_gradient and trained is None:
                    gradients[0][piece].copy_(torch.autograd.grad(frozen_logits, x, logits)[0])
                elif need_gradient and trained is not None:
                    torch.mm(logits, trained, out=gradients[0][piece])
                    if gradients[1].dtype == logits.dtype:
                        gradients[1].addmm_(logits.T, x)
                    else:
                        gradients[1].add_(logits.T @ x)
        all_values = {name: torch.cat([block[name] for block in values]) for name in values[0]}
        loss = (all_values["loss"] * row_weight).sum()
    if need_gradient:
        loss = KnownGradients.apply(loss, gradients, *inputs)
    return loss, all_values, torch.cat(correct)


def _slices(whole: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))


class KnownGradients(torch.autograd.Function):
    """``apply(loss, gradients, *inputs)``: the scalar ``loss`` as a function of inputs whose gradients are known.

    The gradients, one of each input or None, are consumed.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor | None], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: they are as large as the draft's weights, and are not read again.
        scaled = (
            None if gradient is None else gradient.mul_(upstream[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
