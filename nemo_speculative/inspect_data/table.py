"""The report's figures in a few lines for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.tokenized_dataset import preview

MOST_DIFFERENCES, MOST_TURNS = 3, 8


def summary(found: dict[str, Any]) -> str:
    """The figures that decide, a line each."""
    here = next(at for at in found["truncation"] if at["length"] == found["max_length"])
    fill, copies, compared = found["packing"], found["duplicates"], found["comparison"]
    sides = f"{found['training']:,} for training, {found['held_out']:,} held out"
    quantiles = found["lengths"].get("quantiles", {})
    lost = f"{here['tokens_lost']:.2%} of the tokens and {here['supervised_lost']:.2%} of the supervised ones"
    ways = ", ".join(f"{way} {one['fill']:.1%}" for way, one in fill["ways"].items())
    left_out = f"{found['refused']['count']:,} refused, {found['unsupervised']['count']:,} without a supervised token"
    lines = [
        ("conversations", f"{found['conversations']:,}: {sides}"),
        ("tokens", f"{found['tokens']:,}, {found['supervised_share']:.1%} of them supervised"),
        ("lengths", ", ".join(f"{float(q):.0%} {n:,}" for q, n in quantiles.items())),
        ("answers", ", ".join(f"{n}: {count:,}" for n, count in list(found["turns"].items())[:MOST_TURNS])),
        ("truncation", f"at {here['length']:,} tokens {here['truncated']:,} are cut, and lose {lost}"),
        ("packing", f"rows of {fill['row_tokens']:,} tokens: {ways}"),
        ("vocabulary", _vocabulary(found["vocabulary"])),
        ("duplicates", f"{copies['copies']:,} copies; {copies['held_out_in_training']:,} held out are trained on too"),
        ("left out", left_out),
        ("chat server", _compared(compared)),
    ]
    lines += [("", f"{n:,} {cause}") for cause, n in compared["causes"].items()]
    lines += [("", text) for one in compared["differences"][:MOST_DIFFERENCES] for text in _difference(one)]
    lines += [("note", note) for note in found["notes"]]
    return "\n".join(f"{name:14}{said}" for name, said in lines)


def shown(rows: Sequence[TokenRow], tokenizer: Any, max_length: int, colour: bool) -> Iterable[str]:
    """Conversations with their supervised tokens in green, as far as they are trained on."""
    key = "green" if colour else "⟦…⟧"
    for row in rows:
        cut = len(row.input_ids) - max_length
        behind = f"\n({cut} more tokens are cut off)" if cut > 0 else ""
        head = f"{row.id}: {len(row.input_ids)} tokens, {sum(row.loss_mask)} supervised ({key})"
        yield f"{head}\n{preview(row.cut(max_length), tokenizer, colour)}{behind}"


def _vocabulary(found: dict[str, Any]) -> str:
    sizes = [f"{row['entries']:,} cover {row['training']:.2%}" for row in found["table"]]
    reach = [f"{float(part):.1%} with {n:,}" for part, n in found["reach"].items()]
    return ", ".join(sizes + reach)


def _compared(found: dict[str, Any]) -> str:
    if not found["turns"]:
        return "nothing to compare: the data are token ids, or no answer lies within the longest length"
    return f"{found['equal']:,} of {found['turns']:,} turns equal {found['server']}"


def _difference(found: dict[str, Any]) -> Iterable[str]:
    yield f"{found['id']}, message {found['message']}, token {found['position']}: {found['note'] or found['cause']}"
    for name in ("before", "trained", "served"):
        yield f"  {name:8}{' '.join(map(repr, found[name]))}"
