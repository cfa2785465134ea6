"""The inspection of a training's data: from a job to a report page, figures.json and a summary for the terminal."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from hydra.utils import get_method

from nemo_speculative.config.schema import Answers, InspectJob
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization, preview
from nemo_speculative.inspect_data.comparison import ByTemplate, Comparison, RunningServer
from nemo_speculative.inspect_data.page import page
from nemo_speculative.inspect_data.survey import Survey, figures
from nemo_speculative.targets.describe import describe_target
from nemo_speculative.utils.files import atomic_write_text, dir_lock
from nemo_speculative.utils.http import api_key
from nemo_speculative.utils.tables import text_table

MAX_DIFFERENCES, MAX_TURNS = 3, 8
"""Number of examples in the terminal's summary."""


def inspect(job: InspectJob) -> str:
    """Writes ``report.html`` and ``figures.json``, and returns the text for the terminal.

    Raises:
        UserError: the target, the data, the server or a conversation to be shown is not available.
    """
    target = describe_target(job.model)
    config, tokenizer = target.config, target.tokenizer
    max_length, packed_length = job.data.lengths(config.max_position_embeddings)
    survey = Survey(Tokenization(tokenizer, target.stop_ids, max_length, config.vocab_size), job.show)
    connection: RunningServer | nullcontext[None] = RunningServer(job.url, api_key()) if job.url else nullcontext()
    with dir_lock(job.directory, "output"), connection as server:
        if server is not None:
            server.check()
        split = get_method(job.data._target_)(job.data, job.seed)
        comparison = Comparison(tokenizer, server or ByTemplate(tokenizer), max_length, job.compare)
        survey.read(split, comparison.add)
        results = figures(survey, split, packed_length, job.seed)
        results |= {"comparison": comparison_figures(comparison, job.url), "notes": _notes(job, survey)}
        title = f"{job.name}, as a draft of {job.model.path} is trained on it"
        atomic_write_text(job.directory / "report.html", page(results, survey.shown, tokenizer, title))
        atomic_write_text(job.directory / "figures.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    rows = previews(survey.shown, tokenizer, max_length, color=sys.stdout.isatty())
    return "\n\n".join([*rows, summary(results)])


def comparison_figures(comparison: Comparison, url: str | None) -> dict[str, Any]:
    """The comparison's part of figures.json."""
    counts = ("conversations", "not_comparable", "turns", "equal", "cut_off")
    return {
        "server": f"the server at {url}" if url else "the tokenizer's template",
        **{name: getattr(comparison, name) for name in counts},
        "causes": dict(comparison.causes.most_common()),
        "differences": [asdict(difference) for difference in comparison.differences],
    }


def _notes(job: InspectJob, survey: Survey) -> list[str]:
    """Remarks without which the figures would mislead."""
    notes, refused = [], survey.refused
    if refused.count:
        notes.append(f"a training refuses {refused.count} conversations, and ends at the first: {refused.examples[0]}")
    if silent := survey.total().silent:
        notes.append(
            f"{silent} answers are trained on as their end alone: the chat template renders nothing of them, as some "
            "do with calls of tools; such a template cannot serve them either"
        )
    if job.data.answers is Answers.target:
        notes.append("data.answers=target: these are the answers of the data; a training has the target write its own")
    if not survey.tallies:
        notes.append("no conversation holds a supervised token: there is nothing to train on")
    return notes + [f"{name} is not shown: a training makes no row of it" for name in survey.not_shown]


def summary(results: dict[str, Any]) -> str:
    """The most important figures, a line each."""
    limit = next(at for at in results["truncation"] if at["length"] == results["max_length"])
    packing, copies, compared = results["packing"], results["duplicates"], results["comparison"]
    quantiles = results["lengths"].get("quantiles", {})
    lost = f"{limit['tokens_lost']:.2%} of the tokens and {limit['supervised_lost']:.2%} of the supervised ones"
    ways = ", ".join(f"{way} {one['fill']:.1%}" for way, one in packing["ways"].items())
    refused, unsupervised = results["refused"]["count"], results["unsupervised"]["count"]
    vocabulary = [f"{row['entries']:,} cover {row['training']:.2%}" for row in results["vocabulary"]["table"]]
    vocabulary += [f"{float(share):.1%} with {n:,}" for share, n in results["vocabulary"]["reach"].items()]
    server = "nothing to compare: the data are token ids, or no answer is within the maximum length"
    if compared["turns"]:
        server = f"{compared['equal']:,} of {compared['turns']:,} turns equal {compared['server']}"
    sides = f"{results['training']:,} for training, {results['held_out']:,} held out"
    lines = [
        ("conversations", f"{results['conversations']:,}: {sides}"),
        ("tokens", f"{results['tokens']:,}, {results['supervised_share']:.1%} of them supervised"),
        ("lengths", ", ".join(f"{float(q):.0%} {n:,}" for q, n in quantiles.items())),
        ("answers", ", ".join(f"{n}: {count:,}" for n, count in list(results["turns"].items())[:MAX_TURNS])),
        ("truncation", f"at {limit['length']:,} tokens {limit['truncated']:,} are cut, and lose {lost}"),
        ("packing", f"rows of {packing['row_tokens']:,} tokens: {ways}"),
        ("vocabulary", ", ".join(vocabulary)),
        ("duplicates", f"{copies['copies']:,} copies; {copies['held_out_in_training']:,} held out are trained on too"),
        ("left out", f"{refused:,} refused, {unsupervised:,} without a supervised token"),
        ("chat server", server),
    ]
    lines += [("", f"{n:,} {cause}") for cause, n in compared["causes"].items()]
    for d in compared["differences"][:MAX_DIFFERENCES]:
        lines.append(("", f"{d['id']}, message {d['message']}, token {d['position']}: {d['note'] or d['cause']}"))
        lines += [("", f"  {name:8}{' '.join(map(repr, d[name]))}") for name in ("before", "trained", "served")]
    return text_table(lines + [("note", note) for note in results["notes"]], "ll")


def previews(rows: Sequence[TokenRow], tokenizer: Any, max_length: int, color: bool) -> Iterator[str]:
    """Conversations up to the length that a training reads, their supervised tokens in green."""
    key = "green" if color else "⟦…⟧"
    for row in rows:
        cut = len(row.input_ids) - max_length
        more = f"\n({cut} more tokens are cut off)" if cut > 0 else ""
        head = f"{row.id}: {len(row.input_ids)} tokens, {sum(row.loss_mask)} supervised ({key})"
        yield f"{head}\n{preview(row.cut(max_length), tokenizer, color)}{more}"
