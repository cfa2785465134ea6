"""What became of the rows, as a table."""

from collections.abc import Mapping

from nemo_speculative.prepare_data.output import Counts, total

HEAD = ("source", "rows", "train", "held out", "left out", "why")


def table(counts: Mapping[str, Counts]) -> str:
    """A line for each source and reason, as Markdown."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(row for name, each in counts.items() for row in _rows(name, each))]
    if len(counts) > 1:
        rows += _rows("all", total(counts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(f"| {' | '.join(t.ljust(w) for t, w in zip(row, widths, strict=True))} |" for row in rows)


def _rows(name: str, counts: Counts) -> list[tuple[str, ...]]:
    first, *others = counts.reasons or [""]
    numbers = (counts.read, counts.train, counts.held_out, sum(counts.left_out.values()))
    return [(name, *map(str, numbers), first), *(("", "", "", "", "", reason) for reason in others)]
