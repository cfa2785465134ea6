"""The figures of a cell, from what each of its answers took."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from nemo_speculative.serving.client import Answer

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Figures:
    """One cell's."""

    answers: int
    """One a turn."""
    refused: int
    """Turns that the server refused, as too long for its context; they are in no other figure."""
    stopped: float
    """Share of the answers that ended by themselves."""
    completion_tokens: int
    verifications: int
    tau: float | None
    """Σ completion tokens / Σ verifications: each token weighs the same.  The prefill's token of each answer counts, as
    in SGLang's ``spec_accept_length``.  None: nothing was verified."""
    histogram: list[int]
    """Verifications that accepted 0, 1, 2 … draft tokens."""
    acceptance_per_position: list[float]
    """Share of the verifications that accepted a draft token at depth i + 1."""
    seconds: float
    """From the first request to the last token."""
    output_tokens_per_second: float
    """Of all conversations together."""
    time_to_first_token: dict[str, float]
    """Seconds, by percentile; so are the next two."""
    inter_token_latency: dict[str, float]
    """Of tokens, see :attr:`~nemo_speculative.serving.client.Answer.inter_token_latencies`."""
    latency: dict[str, float]
    """Of whole answers."""
    accuracy: float | None
    """Share of the conversations whose last answer is right; None: the suite has no such rule."""


def figures_of(answers: Sequence[Answer], seconds: float, refused: int, accuracy: float | None) -> Figures:
    """The figures of ``answers`` that came within ``seconds``."""
    tokens = sum(answer.completion_tokens for answer in answers)
    verifications = sum(answer.verifications for answer in answers)
    histogram = [sum(counts) for counts in zip_longest(*(a.histogram for a in answers), fillvalue=0)]
    return Figures(
        answers=len(answers),
        refused=refused,
        stopped=sum(answer.stopped for answer in answers) / len(answers),
        completion_tokens=tokens,
        verifications=verifications,
        tau=tokens / verifications if verifications else None,
        histogram=histogram,
        acceptance_per_position=acceptance_per_position(histogram),
        seconds=seconds,
        output_tokens_per_second=tokens / seconds,
        time_to_first_token=percentiles([answer.time_to_first_token for answer in answers]),
        inter_token_latency=percentiles([gap for answer in answers for gap in answer.inter_token_latencies]),
        latency=percentiles([answer.latency for answer in answers]),
        accuracy=accuracy,
    )


def acceptance_per_position(histogram: Sequence[int]) -> list[float]:
    """Share of the verifications that accepted more than i drafts, for every depth that was reached.

    Args:
        histogram: how many of them accepted 0, 1, 2 … draft tokens.
    """
    total = sum(histogram)
    return [sum(histogram[depth:]) / total for depth in range(1, len(histogram))] if total else []


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so many percent of ``values`` do not exceed (nearest rank); empty for no values."""
    ordered = sorted(values)
    ranks = {f"p{p}": max(math.ceil(p / 100 * len(ordered)), 1) - 1 for p in PERCENTILES}
    return {name: ordered[rank] for name, rank in ranks.items()} if ordered else {}
