"""The report: one page that needs nothing else, in the light and in the dark."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.inspect_data.plots import Curve, bars, curves
from nemo_speculative.inspect_data.tally import COVERAGE_BINS
from nemo_speculative.utils import svg

MOST_TURNS = 30
MOST_SHOWN_TOKENS = 4096
GOOD, BAD = ("#{:02x}{:02x}{:02x}".format(*color) for color in (svg.GOOD, svg.BAD))
STYLE = f"""
:root{{color-scheme:light dark;
--ink:#222;--paper:#fff;--grid:#ddd;--faint:#666;--good:{GOOD};--bad:{BAD};--said:#cfe8ea}}
@media(prefers-color-scheme:dark){{
:root{{--ink:#e6e6e6;--paper:#16181b;--grid:#3a3d42;--faint:#9a9ea5;--good:#4fb3c4;--bad:#e88a6e;--said:#1d4a52}}}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1320px;margin:2em auto;
padding:0 1em}}
h1{{font-size:1.4em}}h2{{font-size:1.1em;margin-top:2em}}
table{{border-collapse:collapse;margin:.5em 0}}td,th{{padding:.15em .9em .15em 0;text-align:right;
border-bottom:1px solid var(--grid)}}td:first-child,th:first-child{{text-align:left}}th{{font-weight:600}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:1em}}
svg{{width:100%;height:auto}}
td.tokens{{text-align:left}}.warn{{color:var(--bad)}}.faint{{color:var(--faint)}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--grid);border-radius:4px;padding:.7em}}
mark{{background:var(--said);color:inherit}}del{{color:var(--faint)}}code{{overflow-wrap:anywhere;white-space:pre-wrap}}
{svg.STYLE}
text{{fill:var(--ink)}}.bar,.key0{{fill:var(--good)}}.key1{{fill:var(--bad)}}.grid{{stroke:var(--grid)}}
.mark{{stroke:var(--bad);stroke-dasharray:4 3}}
.curve0,.curve1{{fill:none;stroke:var(--good);stroke-width:2}}.curve1{{stroke:var(--bad);stroke-dasharray:6 3}}
"""


def page(found: dict[str, Any], shown: Sequence[TokenRow], tokenizer: Any, title: str) -> str:
    """The HTML of ``figures`` with their ``comparison``.

    Args:
        shown: conversations to print, uncut.
        title: of what the report is.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _notes(found["notes"]),
        _overview(found),
        f'<div class="plots">{"".join(_plots(found))}</div>',
        "<h2>Cut at a length</h2>",
        _truncation(found),
        "<h2>Rows of packed documents</h2>",
        _packing(found["packing"]),
        "<h2>Draft vocabulary</h2>",
        _vocabulary(found["vocabulary"]),
        "<h2>Sources</h2>" + _sources(found["sources"]) if len(found["sources"]) > 1 else "",
        "<h2>Left out, and twice</h2>",
        _left_out(found),
        "<h2>Training beside a chat server</h2>",
        _comparison(found["comparison"]),
        "<h2>Conversations</h2>",
        *(conversation(row, tokenizer, found["max_length"]) for row in shown),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The first column to the left, the others to the right."""
    cells = lambda row, tag: "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)  # noqa: E731
    lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def conversation(row: TokenRow, tokenizer: Any, max_length: int) -> str:
    """The text of ``row``: supervised tokens marked, those behind ``max_length`` crossed out."""
    pieces, limit = [], min(len(row.input_ids), MOST_SHOWN_TOKENS)
    kinds = [(n >= max_length, row.loss_mask[n]) for n in range(limit)]
    start = 0
    for (cut, said), run in groupby(kinds):
        end = start + len(list(run))
        text = escape(tokenizer.decode(row.input_ids[start:end]))
        text = f"<mark>{text}</mark>" if said else text
        pieces.append(f"<del>{text}</del>" if cut else text)
        start = end
    more = len(row.input_ids) - limit
    pieces.append(f'<span class="faint"> … {more} more tokens</span>' if more else "")
    counted = f"{len(row.input_ids):,} tokens, {sum(row.loss_mask):,} <mark>supervised</mark>"
    return f"<h3>{escape(row.id)}</h3><p>{counted}</p><pre>{''.join(pieces)}</pre>"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)


def _overview(found: dict[str, Any]) -> str:
    quantiles = found["lengths"].get("quantiles", {})
    lengths = " · ".join(f"{float(q):.0%} {n:,}" for q, n in quantiles.items())
    rows = [
        ("conversations", f"{found['conversations']:,}"),
        ("for training, held out", f"{found['training']:,}, {found['held_out']:,}"),
        ("tokens", f"{found['tokens']:,}"),
        ("supervised", f"{found['supervised_tokens']:,} ({found['supervised_share']:.1%})"),
        ("lengths, quantiles", lengths),
        ("messages", " · ".join(f"{role} {n:,}" for role, n in found["roles"].items()) or "rows of token ids"),
    ]
    return table(("", ""), rows)


def _plots(found: dict[str, Any]) -> Iterable[str]:
    lengths = found["lengths"]["histogram"]
    mark = next((n for n, (edge, _) in enumerate(lengths) if edge >= found["max_length"]), None)
    yield bars("Length of conversations", "tokens, from", [(f"{edge:,}", n) for edge, n in lengths], mark)
    coverage = found["coverage_histogram"]
    width = 100 // COVERAGE_BINS
    yield bars("Supervised share", "of a conversation's tokens, from", [
        (f"{width * bin}%", coverage[bin] if bin < len(coverage) else 0) for bin in range(COVERAGE_BINS)
    ])  # fmt: skip
    yield bars("Answers in a conversation", "answers", _turns(found["turns"]))
    if found["vocabulary"]["curve"]:
        yield _vocabulary_curve(found["vocabulary"])


def _turns(turns: dict[int, int]) -> list[tuple[str, float]]:
    last = min(max(turns, default=0), MOST_TURNS)
    counted: list[tuple[str, float]] = [(str(n), turns.get(n, 0)) for n in range(1, last + 1)]
    more = sum(count for n, count in turns.items() if n > last)
    return counted + ([(f">{last}", more)] if more else [])


def _vocabulary_curve(found: dict[str, Any]) -> str:
    sides = {"training": "training", "held_out": "held out, by the same ids"}
    drawn = [
        Curve(name, [(point["entries"], point[side]) for point in found["curve"]])
        for side, name in sides.items()
        if side in found["curve"][0]
    ]
    reached: dict[int, list[str]] = {}
    for part, entries in found["reach"].items():
        reached.setdefault(entries, []).append(f"{float(part):.1%}")
    marks = {entries: ", ".join(parts) for entries, parts in reached.items()}
    return curves("Draft vocabulary: share of supervised tokens", "entries", drawn, marks)


def _truncation(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{at['length']:,}" + (" (data.max_length)" if at["length"] == found["max_length"] else ""),
            f"{at['truncated']:,}",
            f"{at['tokens_lost']:.2%}",
            f"{at['supervised_lost']:.2%}",
            f"{at['left_out']:,}",
        )
        for at in found["truncation"]
    ]
    return table(("tokens", "cut", "tokens lost", "supervised lost", "left out whole"), rows)


def _packing(found: dict[str, Any]) -> str:
    rows = [(way, f"{w['rows']:,}", f"{w['fill']:.1%}") for way, w in found["ways"].items()]
    return f"<p>{found['documents']:,} documents in rows of {found['row_tokens']:,} tokens</p>" + table(
        ("", "rows", "filled"), rows
    )


def _vocabulary(found: dict[str, Any]) -> str:
    named = sorted({source for row in found["table"] for source in row["sources"] if source})
    percent = lambda value: "-" if value is None else f"{value:.2%}"  # noqa: E731
    rows = [
        (f"{row['entries']:,}", percent(row.get("training")), percent(row.get("held_out")),
         *(percent(row["sources"].get(source)) for source in named))
        for row in found["table"]
    ]  # fmt: skip
    reach = ", ".join(f"{float(part):.1%} with {n:,}" for part, n in found["reach"].items())
    said = f"<p>{found['distinct']:,} of {found['size']:,} ids are supervised{'; ' + reach if reach else ''}</p>"
    return said + table(("entries", "training", "held out", *named), rows)


def _sources(found: dict[str, Any]) -> str:
    rows = [
        (name or "(none)", f"{s['conversations']:,}", f"{s['tokens']:,}", f"{s['supervised_share']:.1%}",
         f"{s['mean_length']:,.0f}", f"{s['truncated']:,}", f"{s['supervised_tokens_lost']:,}")
        for name, s in found.items()
    ]  # fmt: skip
    return table(
        ("source", "conversations", "tokens", "supervised", "mean length", "cut", "supervised tokens lost"), rows
    )


def _left_out(found: dict[str, Any]) -> str:
    refused, unsupervised, copies = found["refused"], found["unsupervised"], found["duplicates"]
    rows = [(f"refused: {reason}", n) for reason, n in refused["reasons"].items()]
    rows += [("without a supervised token", unsupervised["count"])]
    rows += [("the same ids as an earlier one", copies["copies"])]
    rows += [("held out and trained on as well", copies["held_out_in_training"])]
    examples = [*refused["examples"], *unsupervised["examples"]]
    examples += [f"{group['rows']} alike: {', '.join(group['ids'])}" for group in copies["largest"]]
    return table(("", "conversations"), rows) + "".join(f'<p class="faint">{escape(one)}</p>' for one in examples)


def _comparison(found: dict[str, Any]) -> str:
    said = (
        f"<p>{found['equal']:,} of {found['turns']:,} turns of {found['conversations']:,} conversations equal what "
        f"{escape(found['server'])} renders; {found['cut_off']:,} turns lie behind the longest length, "
        f"{found['not_comparable']:,} conversations could not be compared</p>"
    )
    counted = table(("cause", "turns"), found["causes"].items()) if found["causes"] else ""
    return said + counted + "".join(_difference(one) for one in found["differences"])


def _difference(found: dict[str, Any]) -> str:
    said = f"{found['id']}, message {found['message']}, token {found['position']}: {found['cause']}"
    said += f" ({found['note']})" if found["note"] else ""
    rows = [(name, "".join(f"{token!r} " for token in found[name])) for name in ("before", "trained", "served")]
    lines = "".join(
        f'<tr><td>{name}</td><td class="tokens"><code>{escape(tokens)}</code></td></tr>' for name, tokens in rows
    )
    return f"<h3>{escape(said)}</h3><table>{lines}</table>"
