"""The report as one self-contained HTML page, in light and dark colors."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.inspect_data.plots import Curve, bars, curves
from nemo_speculative.inspect_data.survey import COVERAGE_BINS
from nemo_speculative.utils import svg

MAX_TURNS = 30
MAX_SHOWN_TOKENS = 4096
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
TEMPLATE = """<!DOCTYPE html>
{% macro table(head, rows) -%}
<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{%- endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style }}</style></head>
<body>
<h1>{{ title }}</h1>
{% for note in f.notes %}<p class="warn">{{ note }}</p>
{% endfor %}
{{ table(["", ""], overview) }}
<div class="plots">{% for plot in plots %}{{ plot }}{% endfor %}</div>
<h2>Truncation</h2>
{{ table(["tokens", "cut", "tokens lost", "supervised lost", "left out whole"], truncation) }}
<h2>Packing</h2>
<p>{{ f.packing.documents|comma }} documents in rows of {{ f.packing.row_tokens|comma }} tokens</p>
{{ table(["", "rows", "filled"], packing) }}
<h2>Draft vocabulary</h2>
<p>{{ f.vocabulary.distinct|comma }} of {{ f.vocabulary.size|comma }} ids are supervised
{%- if reach %}; {{ reach|join(", ") }}{% endif %}</p>
{{ table(["entries", "training", "held out"] + vocabulary_sources, vocabulary) }}
{% if f.sources|length > 1 %}<h2>Sources</h2>
{{ table(["source", "conversations", "tokens", "supervised", "mean length", "cut", "supervised tokens lost"],
         sources) }}
{% endif %}
<h2>Left out and duplicates</h2>
{{ table(["", "conversations"], left_out) }}
{% for example in examples %}<p class="faint">{{ example }}</p>
{% endfor %}
<h2>Training compared with a chat server</h2>
{% set c = f.comparison %}
<p>{{ c.equal|comma }} of {{ c.turns|comma }} turns of {{ c.conversations|comma }} conversations
equal what {{ c.server }} renders; {{ c.cut_off|comma }} turns are beyond the maximum length,
{{ c.not_comparable|comma }} conversations could not be compared</p>
{% if c.causes %}{{ table(["cause", "turns"], c.causes.items()) }}{% endif %}
{% for d in c.differences %}
<h3>{{ d.id }}, message {{ d.message }}, token {{ d.position }}: {{ d.cause }}
{%- if d.note %} ({{ d.note }}){% endif %}</h3>
<table>{% for side in ["before", "trained", "served"] -%}
<tr><td>{{ side }}</td><td class="tokens"><code>{{ d[side]|quote }}</code></td></tr>
{%- endfor %}</table>
{% endfor %}
<h2>Conversations</h2>
{% for row in conversations %}{{ row }}
{% endfor %}
</body></html>
"""
CONVERSATION = """<h3>{{ row.id }}</h3>
<p>{{ row.input_ids|length|comma }} tokens, {{ row.loss_mask|sum|comma }} <mark>supervised</mark></p>
<pre>{% for cut, supervised, text in spans -%}
{% if cut %}<del>{% endif %}{% if supervised %}<mark>{% endif %}{{ text }}
{%- if supervised %}</mark>{% endif %}{% if cut %}</del>{% endif %}
{%- endfor %}{% if more %}<span class="faint"> … {{ more }} more tokens</span>{% endif %}</pre>"""
JINJA = Environment(autoescape=True, keep_trailing_newline=True, undefined=StrictUndefined)
JINJA.filters |= {"comma": "{:,}".format, "quote": lambda tokens: " ".join(map(repr, tokens))}


def page(figures: dict[str, Any], rows: Sequence[TokenRow], tokenizer: Any, title: str) -> str:
    """The HTML of ``figures``, which include the comparison.

    Args:
        rows: conversations to show, not truncated.
    """
    refused, unsupervised, copies = figures["refused"], figures["unsupervised"], figures["duplicates"]
    left_out = [(f"refused: {reason}", n) for reason, n in refused["reasons"].items()]
    left_out += [("without a supervised token", unsupervised["count"])]
    left_out += [("the same ids as an earlier one", copies["copies"])]
    left_out += [("held out and trained on as well", copies["held_out_in_training"])]
    examples = [*refused["examples"], *unsupervised["examples"]]
    examples += [f"{group['rows']} equal: {', '.join(group['ids'])}" for group in copies["largest"]]
    vocabulary_sources, vocabulary = _vocabulary(figures["vocabulary"])
    return JINJA.from_string(TEMPLATE).render(
        title=title,
        style=Markup(STYLE),
        f=figures,
        overview=_overview(figures),
        plots=map(Markup, _plots(figures)),
        truncation=_truncation(figures),
        packing=[(way, f"{w['rows']:,}", f"{w['fill']:.1%}") for way, w in figures["packing"]["ways"].items()],
        vocabulary=vocabulary,
        vocabulary_sources=vocabulary_sources,
        reach=[f"{float(share):.1%} with {n:,}" for share, n in figures["vocabulary"]["reach"].items()],
        sources=_sources(figures["sources"]),
        left_out=left_out,
        examples=examples,
        conversations=[Markup(conversation(row, tokenizer, figures["max_length"])) for row in rows],
    )


def conversation(row: TokenRow, tokenizer: Any, max_length: int) -> str:
    """The HTML of ``row``'s text: supervised tokens are marked, those after ``max_length`` crossed out."""
    limit = min(len(row.input_ids), MAX_SHOWN_TOKENS)
    spans, start = [], 0
    for (cut, supervised), run in groupby((n >= max_length, row.loss_mask[n]) for n in range(limit)):
        end = start + len(list(run))
        spans.append((cut, supervised, tokenizer.decode(row.input_ids[start:end])))
        start = end
    return JINJA.from_string(CONVERSATION).render(row=row, spans=spans, more=len(row.input_ids) - limit)


def _overview(figures: dict[str, Any]) -> list[tuple[str, str]]:
    quantiles = figures["lengths"].get("quantiles", {})
    return [
        ("conversations", f"{figures['conversations']:,}"),
        ("for training, held out", f"{figures['training']:,}, {figures['held_out']:,}"),
        ("tokens", f"{figures['tokens']:,}"),
        ("supervised", f"{figures['supervised_tokens']:,} ({figures['supervised_share']:.1%})"),
        ("lengths, quantiles", " · ".join(f"{float(q):.0%} {n:,}" for q, n in quantiles.items())),
        ("messages", " · ".join(f"{role} {n:,}" for role, n in figures["roles"].items()) or "rows of token ids"),
    ]


def _plots(figures: dict[str, Any]) -> Iterable[str]:
    lengths = figures["lengths"]["histogram"]
    mark = next((n for n, (edge, _) in enumerate(lengths) if edge >= figures["max_length"]), None)
    yield bars("Length of conversations", "tokens, from", [(f"{edge:,}", n) for edge, n in lengths], mark)
    coverage = figures["coverage_histogram"]
    coverage = [*coverage, *[0] * (COVERAGE_BINS - len(coverage))]
    shares = [(f"{100 * bin // COVERAGE_BINS}%", count) for bin, count in enumerate(coverage)]
    yield bars("Supervised share", "of a conversation's tokens, from", shares)
    turns = figures["turns"]
    last = min(max(turns, default=0), MAX_TURNS)
    counts: list[tuple[str, float]] = [(str(n), turns.get(n, 0)) for n in range(1, last + 1)]
    if more := sum(count for n, count in turns.items() if n > last):
        counts.append((f">{last}", more))
    yield bars("Answers in a conversation", "answers", counts)
    if figures["vocabulary"]["curve"]:
        yield _vocabulary_curve(figures["vocabulary"])


def _vocabulary_curve(vocabulary: dict[str, Any]) -> str:
    sides = {"training": "training", "held_out": "held out, by the same ids"}
    drawn = [
        Curve(name, [(point["entries"], point[side]) for point in vocabulary["curve"]])
        for side, name in sides.items()
        if side in vocabulary["curve"][0]
    ]
    shares: dict[int, list[str]] = {}
    for share, entries in vocabulary["reach"].items():
        shares.setdefault(entries, []).append(f"{float(share):.1%}")
    marks = {entries: ", ".join(names) for entries, names in shares.items()}
    return curves("Draft vocabulary: share of supervised tokens", "entries", drawn, marks)


def _truncation(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"{at['length']:,}" + (" (data.max_length)" if at["length"] == figures["max_length"] else ""),
            f"{at['truncated']:,}",
            f"{at['tokens_lost']:.2%}",
            f"{at['supervised_lost']:.2%}",
            f"{at['left_out']:,}",
        )
        for at in figures["truncation"]
    ]


def _vocabulary(vocabulary: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The names of the sources, and a row of shares for each size."""
    names = sorted({source for row in vocabulary["table"] for source in row["sources"] if source})
    rows = []
    for row in vocabulary["table"]:
        shares = [row.get("training"), row.get("held_out"), *(row["sources"].get(name) for name in names)]
        rows.append((f"{row['entries']:,}", *("-" if share is None else f"{share:.2%}" for share in shares)))
    return names, rows


def _sources(sources: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name or "(none)", f"{s['conversations']:,}", f"{s['tokens']:,}", f"{s['supervised_share']:.1%}",
         f"{s['mean_length']:,.0f}", f"{s['truncated']:,}", f"{s['supervised_tokens_lost']:,}")
        for name, s in sources.items()
    ]  # fmt: skip
