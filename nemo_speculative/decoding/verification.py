"""Lossless verification: which draft tokens the target would have produced itself."""

from collections.abc import Sequence


def verify_greedy(draft_tokens: Sequence[int], target_best: Sequence[int]) -> list[int]:
    """The tokens that greedy decoding emits: the leading draft tokens that equal the target's, and one of its own.

    Args:
        draft_tokens: k tokens of a chain.
        target_best: k + 1 argmaxes of the target: after the last verified token and after each draft token.

    Returns:
        1 to k + 1 tokens.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == target_best[accepted]:
        accepted += 1
    return list(target_best[: accepted + 1])
