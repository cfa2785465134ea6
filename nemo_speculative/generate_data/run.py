"""Answers a range of questions with an engine, and summarizes the outcome of each line."""

import contextlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_class, instantiate

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.data.conversations import Conversation
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.concurrency import RunCoroutine, for_each, interruptible
from nemo_speculative.generate_data.engines import CompletionFailed, Engine
from nemo_speculative.generate_data.prompt_file import Item, PromptFile
from nemo_speculative.generate_data.rollout import Limits, Rollout, Unanswerable, converse
from nemo_speculative.generate_data.shard_dir import (
    ANSWERS,
    FAILED,
    FORMAT,
    LEFT_OUT,
    SKIPPED,
    ShardDir,
    read_records,
    sort_records,
)
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress
from nemo_speculative.utils.tables import text_table

MAX_DUPLICATE_IDS = 3
MAX_REASONS = 8
"""Number of examples shown of each kind; left_out.jsonl has all of them."""


@dataclass
class Outcome:
    """The outcome of the lines of a range."""

    directory: Path
    total: int
    answered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines that cannot be answered, by reason."""
    failed: Counter[str] = field(default_factory=Counter)
    """Lines whose answers the next run tries again, by reason."""
    finishes: Counter[str] = field(default_factory=Counter)
    """Answers by how they ended, see :class:`nemo_speculative.generate_data.rollout.Rollout`."""
    text_only: int = 0
    """Conversations without the ids of their answers."""
    num_duplicate_ids: int = 0
    """Lines with the id of an earlier one."""
    duplicate_ids: list[str] = field(default_factory=list)
    """Some of the repeated ids."""


def generate_data(job: GenerateJob) -> Outcome:
    """Answers the lines of a job's range that have no answer yet.

    Raises:
        UserError: the input is malformed, stored answers were made with other settings, or no engine can answer.
    """
    with interruptible() as run:
        prompts = PromptFile.open(job)
        directory = Path(job.output) / prompts.name
        with dir_lock(directory, "output"):
            _answer_range(job, prompts, directory, run)
            return summarize(directory, len(prompts))


def _answer_range(job: GenerateJob, prompts: PromptFile, directory: Path, run: RunCoroutine) -> None:
    engine = build_engine(job)
    try:
        manifest = run(_manifest(job, prompts, engine))
        with contextlib.closing(ShardDir(directory, prompts, manifest)) as shard:
            if shard.num_pending:
                engine.prepare()
                run(_answer_pending(job, prompts, engine, shard))
    finally:
        run(engine.close())


def build_engine(job: GenerateJob) -> Engine:
    sampling = Sampling(job.temperature, job.top_p, job.top_k)
    return get_class(job.engine._target_)(job.engine, job.model, sampling)


async def _manifest(job: GenerateJob, prompts: PromptFile, engine: Engine) -> dict[str, Any]:
    """Everything that the answers depend on."""
    questions = {"input": prompts.digest, "input_lines": prompts.num_lines, "range": [prompts.start, prompts.end]}
    sampling = {"top_p": job.top_p, "top_k": job.top_k, "seed": job.seed} if job.temperature else {}
    return {
        "format": FORMAT, **questions, **await engine.identity(), **engine.rendering(), "temperature": job.temperature,
        **sampling, "max_new_tokens": job.max_new_tokens, "max_length": _max_length(job, engine),
        "keep_cut": job.keep_cut, "reasoning": [job.reasoning._target_.rpartition(".")[2], *job.reasoning.tags],
    }  # fmt: skip


def _max_length(job: GenerateJob, engine: Engine) -> int:
    if (job.max_length or 0) > engine.context:
        raise UserError(f"max_length is {job.max_length}: the target's context is {engine.context}; lower it")
    return job.max_length or engine.context


async def _answer_pending(job: GenerateJob, prompts: PromptFile, engine: Engine, shard: ShardDir) -> None:
    """Answers the pending lines of ``shard``, many conversations at a time; each is stored when it is complete."""
    limits, reasoning = Limits(job.max_new_tokens, _max_length(job, engine)), instantiate(job.reasoning)
    progress = Progress(f"answering {prompts.file}", shard.num_pending)

    async def answer(numbered: tuple[int, Item]) -> None:
        index, item = numbered
        if isinstance(item, Conversation):
            chat_template_of(engine.tokenizer)
        try:
            rollout = Rollout(item, engine.tokenizer, reasoning)
            await converse(rollout, engine.complete, limits, job.seed)
            if not rollout.num_turns:
                raise Unanswerable(item.origin, "no token of it is supervised, so it asks nothing")
            if "length" in rollout.finish and not job.keep_cut:
                raise Unanswerable(item.origin, "an answer was cut at its limit (keep_cut=false)")
            shard.add_answer(index, rollout.record())
        except Unanswerable as error:
            shard.add_left_out(index, item.id, SKIPPED, error.reason)
        except CompletionFailed as error:
            shard.add_left_out(index, item.id, FAILED, error.reason, error.detail, error.attempts)
        progress.advance()

    await for_each(prompts.items(shard.is_pending), answer, engine.concurrency)
    progress.close()


def summarize(directory: Path, total: int) -> Outcome:
    """Sorts the files of a shard that no process writes, and counts their records.

    Raises:
        UserError: they do not hold every one of the ``total`` lines exactly once.
        OSError: the disk is too full for the sorted copies.
    """
    outcome = Outcome(directory, total)
    sort_records(directory / ANSWERS)
    left_out_before = {record.index for record in read_records(directory / LEFT_OUT)}
    answered_since: set[int] = set()
    id_hashes = array("q")
    for record in read_records(directory / ANSWERS):
        if record.index in left_out_before:
            answered_since.add(record.index)
        content = record.content()
        id_hashes.append(hash(content["id"]))
        outcome.answered += 1
        outcome.finishes.update(content["finish"])
        outcome.text_only += "rows" not in content and "input_ids" not in content
    sort_records(directory / LEFT_OUT, drop=answered_since)
    for record in read_records(directory / LEFT_OUT):
        content = record.content()
        id_hashes.append(hash(content["id"]))
        (outcome.skipped if content["outcome"] == SKIPPED else outcome.failed)[content["reason"]] += 1
    if outcome.answered + outcome.skipped.total() + outcome.failed.total() != total:
        raise UserError(
            f"{directory}: {outcome.answered} answered, {outcome.skipped.total()} skipped and "
            f"{outcome.failed.total()} failed are not the {total} lines of the range; start the same command again"
        )
    hashes, counts = np.unique(id_hashes, return_counts=True)
    outcome.num_duplicate_ids = total - len(hashes)
    if outcome.num_duplicate_ids:
        outcome.duplicate_ids = _ids_with(set(hashes[counts > 1].tolist()), directory)
    return outcome


def _ids_with(hashes: set[int], directory: Path) -> list[str]:
    """The first ids with one of ``hashes``."""
    ids: dict[str, None] = {}
    for record in (record for name in (ANSWERS, LEFT_OUT) for record in read_records(directory / name)):
        item_id = record.content()["id"]
        if hash(item_id) in hashes:
            ids[item_id] = None
        if len(ids) == MAX_DUPLICATE_IDS:
            break
    return list(ids)


def summary_table(outcome: Outcome) -> str:
    """A line each for the input, the answers, and the skipped and failed lines by reason."""
    rows = [("input", str(outcome.total), str(outcome.directory))]
    if outcome.num_duplicate_ids:
        examples = ", ".join(outcome.duplicate_ids)
        rows.append(("", str(outcome.num_duplicate_ids), f"of them have the id of an earlier line ({examples})"))
    rows.append(("answered", str(outcome.answered), _describe_answers(outcome)))
    for name, reasons in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        rows.append((name, str(reasons.total()), ""))
        shown, others = reasons.most_common()[:MAX_REASONS], reasons.most_common()[MAX_REASONS:]
        rows += [("", str(count), reason) for reason, count in shown]
        if others:
            rows.append(("", str(sum(count for _, count in others)), f"for {len(others)} other reasons"))
    return text_table(rows, "lrl")


def _describe_answers(outcome: Outcome) -> str:
    finishes = outcome.finishes
    notes = [f"{finishes['stop'] + finishes['length']} answers in {ANSWERS}"] if outcome.answered else []
    notes += [f"{finishes['length']} of them cut at their limit"] if finishes["length"] else []
    notes += [f"{finishes['context']} conversations ended by the context"] if finishes["context"] else []
    if outcome.text_only:
        notes += [f"{outcome.text_only} conversations as text only: the server returns no ids, training tokenizes them"]
    return "; ".join(notes)


def require_success(outcome: Outcome) -> None:
    """Ends the program with an error if lines failed.

    Raises:
        UserError: at least one failed.
    """
    if outcome.failed:
        reason, _ = outcome.failed.most_common(1)[0]
        raise UserError(
            f"{outcome.failed.total()} of {outcome.total} lines failed, most of them with: {reason}; the same command "
            "tries them again"
        )
