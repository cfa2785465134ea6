"""Text tables for terminals, log files and Markdown."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], align: str, gap: str = "  ") -> str:
    """Rows with columns as wide as their longest cell; ``align`` has ``l`` or ``r`` for each column."""
    rows = list(rows)
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(align))]
    lines = []
    for row in rows:
        cells = zip(row, widths, align, strict=True)
        lines.append(gap.join(cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in cells))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text."""
    rows = [head, ["---"] * len(head), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)
