"""Acceptance figures from counts of verifications, for every decoder in use: this package's and SGLang."""

from collections.abc import Sequence


def acceptance_length(tokens: int, verifications: int) -> float | None:
    """τ: tokens emitted per verification, including the target's own token of each; None without verifications.

    The caller decides whether the first token of an answer, which the prefill emits, is counted: evaluate.py does not
    count it, SGLang's ``spec_accept_length`` does.
    """
    return tokens / verifications if verifications else None


def acceptance_per_position(histogram: Sequence[int]) -> list[float]:
    """Share of the verifications that accepted a draft token at depth i + 1, for every depth that was reached.

    Without the prefill's tokens, τ is 1 + the sum of these.  ``histogram`` has the number of verifications that
    accepted 0, 1, 2, … draft tokens.
    """
    total = sum(histogram)
    return [sum(histogram[depth:]) / total for depth in range(1, len(histogram))] if total else []
