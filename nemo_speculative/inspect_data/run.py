"""What the recipe does, from a job to a report."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from hydra.utils import get_method

from nemo_speculative.config.schema import Answers, InspectJob
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.inspect_data.comparison import ByTemplate, ChatServer, Comparison
from nemo_speculative.inspect_data.figures import figures
from nemo_speculative.inspect_data.page import page
from nemo_speculative.inspect_data.server import RunningServer
from nemo_speculative.inspect_data.survey import Survey
from nemo_speculative.inspect_data.table import shown, summary
from nemo_speculative.targets.describe import describe_target
from nemo_speculative.utils.files import atomic_write_text
from nemo_speculative.utils.http import api_key
from nemo_speculative.utils.locks import dir_lock


def inspect(job: InspectJob) -> str:
    """Writes ``report.html`` and ``figures.json`` and returns what of them goes to the terminal.

    Raises:
        UserError: the target, the data, the server or a conversation to be shown cannot be had.
    """
    target = describe_target(job.model)
    config, tokenizer = target.config, target.tokenizer
    max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
    survey = Survey(Tokenization(tokenizer, target.stop_ids, max_length, config.vocab_size), job.show)
    with dir_lock(job.directory, "output"), _server(job, tokenizer) as server:
        split = get_method(job.data._target_)(job.data, job.seed)
        comparison = Comparison(tokenizer, server, max_length, job.compare)
        survey.read(split, comparison.add)
        found = figures(survey, split, row_tokens, job.seed)
        found |= {"comparison": _plain(comparison, job), "notes": _notes(job, survey)}
        title = f"{job.name}, as a draft of {job.model.path} is trained on it"
        atomic_write_text(job.directory / "report.html", page(found, survey.shown, tokenizer, title))
        atomic_write_text(job.directory / "figures.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return "\n\n".join([*shown(survey.shown, tokenizer, max_length, sys.stdout.isatty()), summary(found)])


@contextmanager
def _server(job: InspectJob, tokenizer: Any) -> Iterator[ChatServer]:
    if job.url is None:
        yield ByTemplate(tokenizer)
        return
    with RunningServer(job.url, api_key()) as server:
        server.check()
        yield server


def _plain(comparison: Comparison, job: InspectJob) -> dict[str, Any]:
    counted = ("conversations", "not_comparable", "turns", "equal", "cut_off")
    return {
        "server": f"the server at {job.url}" if job.url else "the tokenizer's template",
        **{name: getattr(comparison, name) for name in counted},
        "causes": dict(comparison.causes.most_common()),
        "differences": [asdict(one) for one in comparison.differences],
    }


def _notes(job: InspectJob, survey: Survey) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    if survey.refused.count:
        notes.append(
            f"a training refuses {survey.refused.count} conversations, and ends at the first: "
            f"{survey.refused.examples[0]}"
        )
    if silent := survey.total().silent:
        notes.append(
            f"{silent} answers are trained on as their end alone: the chat template renders nothing of them, as some "
            "do with calls of tools; such a template cannot serve them either"
        )
    if job.data.answers is Answers.target:
        notes.append("data.answers=target: these are the answers of the data; a training has the target write its own")
    if not survey.tallies:
        notes.append("no conversation holds a supervised token: there is nothing to train on")
    notes += [f"{name} is not shown: a training makes no row of it" for name in survey.not_shown]
    return notes
