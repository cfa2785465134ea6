"""Measurements as text."""

from nemo_speculative.evaluation.acceptance import Evaluation


def describe(evaluation: Evaluation) -> str:
    """A table of the draft beside plain decoding and n-gram drafting on the same questions."""
    plain = evaluation.plain.tokens_per_second
    lines = [
        f"measured on {len(evaluation.plain.generations)} held-out questions, {evaluation.conditions}",
        f"  {'':14}{'tau':>6}{'tau, finished':>15}{'tokens/s':>10}{'speed-up':>10}   accepted at draft position",
    ]
    for name, way in (("draft", evaluation.draft), ("n-gram", evaluation.ngram), ("plain decoding", evaluation.plain)):
        accepted = way.acceptance_per_position(evaluation.num_steps) if way is not evaluation.plain else []
        lines.append(
            f"  {name:14}{way.tau:6.2f}{_number(way.tau_finished):>15}{way.tokens_per_second:10.0f}"
            f"{way.tokens_per_second / plain:9.2f}x   {' '.join(f'{share:.2f}' for share in accepted)}"
        )
    if evaluation.lossless is not None:
        equal = "equal token by token"
        verdict = equal if evaluation.lossless else "NOT equal (near ties in this dtype: docs/troubleshooting)"
        total = len(evaluation.plain.generations)
        lines.append(f"  answers with and without the draft: {evaluation.identical} of {total} {verdict}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
