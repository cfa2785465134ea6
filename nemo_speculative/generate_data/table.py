"""What became of the lines of a range, for the reader."""

from collections import Counter

from nemo_speculative.generate_data.moves import ANSWERS
from nemo_speculative.generate_data.shard_dir import Outcome

REASONS = 8
"""Shown of each kind; left_out.jsonl has them all."""


def table(outcome: Outcome) -> str:
    """A line each for what went in, came out and was left out, with the reasons."""
    lines = [f"{'input':9}{outcome.asked:>9}  {outcome.directory}"]
    if outcome.namesakes:
        named = ", ".join(outcome.shared_ids)
        lines += [f"{'':9}{outcome.namesakes:>9}  of them have the id of an earlier line ({named})"]
    lines += [f"{'answered':9}{outcome.answered:>9}  {_how(outcome)}".rstrip()]
    for name, reasons in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        lines += [f"{name:9}{reasons.total():>9}"]
        lines += [f"{'':9}{number:>9}  {reason}" for reason, number in reasons.most_common(REASONS)]
        lines += _rest(reasons)
    return "\n".join(lines)


def _rest(reasons: Counter[str]) -> list[str]:
    rest = reasons.most_common()[REASONS:]
    return [f"{'':9}{sum(number for _, number in rest):>9}  for {len(rest)} other reasons"] if rest else []


def _how(outcome: Outcome) -> str:
    ends = outcome.finishes
    notes = [f"{ends['stop'] + ends['length']} answers in {ANSWERS}"] if outcome.answered else []
    notes += [f"{ends['length']} of them cut at their limit"] if ends["length"] else []
    notes += [f"{ends['context']} conversations ended by the context"] if ends["context"] else []
    if outcome.inexact:
        notes += [f"{outcome.inexact} conversations as text only: the server does not tell ids, training tokenises it"]
    return "; ".join(notes)
