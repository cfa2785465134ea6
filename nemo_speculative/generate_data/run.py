"""Answers a range of questions with an engine, and summarizes the outcome of each line."""

import asyncio
import contextlib
import signal
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_class, instantiate

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.chat_template import chat_template_of, tokenizer_digest
from nemo_speculative.data.conversations import Conversation, Item
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engines import CompletionFailed, Engine
from nemo_speculative.generate_data.rollout import Limits, Rollout, Unanswerable, converse, for_each
from nemo_speculative.generate_data.shard_dir import (
    ANSWERS,
    FAILED,
    FORMAT,
    LEFT_OUT,
    SKIPPED,
    PromptFile,
    ShardDir,
    read_records,
    sort_records,
)
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress
from nemo_speculative.utils.tables import text_table

MAX_DUPLICATE_IDS, MAX_REASONS = 3, 8
"""Number of examples that the summary shows of each kind; left_out.jsonl has all of them."""


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
        prompts = PromptFile(job)
        directory = Path(job.output) / prompts.name
        with dir_lock(directory, "output"):
            engine = build_engine(job)
            try:
                manifest = _manifest(job, prompts, engine, run(engine.identity()))
                with contextlib.closing(ShardDir(directory, prompts, manifest)) as shard:
                    if shard.num_pending:
                        engine.prepare()
                        run(_answer_pending(job, prompts, engine, shard, manifest["max_length"]))
            finally:
                run(engine.close())
            return summarize(directory, len(prompts))


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Yields a function that runs a coroutine to its end; all of a job run in one event loop.

    Ctrl-C and SIGTERM raise KeyboardInterrupt inside: at once, or after the running coroutine was canceled.
    Where Ctrl-C is ignored, as in a script's background jobs, it stays ignored; SIGTERM works there too.
    """
    running: asyncio.Task[Any] | None = None

    def interrupt(*_: object) -> None:
        if running is None:
            raise KeyboardInterrupt
        running.get_loop().call_soon_threadsafe(running.cancel)

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        nonlocal running
        running = runner.get_loop().create_task(coroutine)
        try:
            return runner.get_loop().run_until_complete(running)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            running = None

    ctrl_c_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    handled = [signal.SIGTERM] if ctrl_c_ignored else [signal.SIGINT, signal.SIGTERM]
    with asyncio.Runner() as runner:
        before = {number: signal.signal(number, interrupt) for number in handled}
        try:
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def build_engine(job: GenerateJob) -> Engine:
    sampling = Sampling(job.temperature, job.top_p, job.top_k)
    return get_class(job.engine._target_)(job.engine, job.model, sampling)


def _manifest(job: GenerateJob, prompts: PromptFile, engine: Engine, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that the answers depend on."""
    if (job.max_length or 0) > engine.context:
        raise UserError(f"max_length is {job.max_length}: the target's context is {engine.context}; lower it")
    questions = {"input": prompts.digest, "input_lines": prompts.num_lines, "range": [prompts.start, prompts.end]}
    sampling = {"top_p": job.top_p, "top_k": job.top_k, "seed": job.seed} if job.temperature else {}
    return {
        "format": FORMAT, **questions, **identity, "tokenizer": tokenizer_digest(engine.tokenizer),
        "stop_ids": sorted(engine.stop_ids), "temperature": job.temperature, **sampling,
        "max_new_tokens": job.max_new_tokens, "max_length": job.max_length or engine.context,
        "keep_cut": job.keep_cut, "reasoning": [job.reasoning._target_.rpartition(".")[2], *job.reasoning.tags],
    }  # fmt: skip


async def _answer_pending(
    job: GenerateJob, prompts: PromptFile, engine: Engine, shard: ShardDir, max_length: int
) -> None:
    """Answers the pending lines of ``shard``, many conversations at a time; each is stored when it is complete."""
    limits, reasoning = Limits(job.max_new_tokens, max_length), instantiate(job.reasoning)
    progress = Progress(f"answering {prompts.file}", shard.num_pending)

    async def answer(numbered: tuple[int, Item]) -> None:
        index, item = numbered
        if isinstance(item, Conversation):
            chat_template_of(engine.tokenizer)
        try:
            rollout = Rollout(item, engine.tokenizer, reasoning)
            await converse(rollout, engine.complete, limits, job.seed)
            if not rollout.questions:
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
    outcome, id_hashes, answered = Outcome(directory, total), array("q"), array("q")
    sort_records(directory / ANSWERS)
    for record in read_records(directory / ANSWERS):
        content = record.content()
        answered.append(record.index)
        id_hashes.append(hash(content["id"]))
        outcome.finishes.update(content["finish"])
        outcome.text_only += "rows" not in content and "input_ids" not in content
    sort_records(directory / LEFT_OUT, drop=answered)
    for record in read_records(directory / LEFT_OUT):
        content = record.content()
        id_hashes.append(hash(content["id"]))
        (outcome.skipped if content["outcome"] == SKIPPED else outcome.failed)[content["reason"]] += 1
    outcome.answered, skipped, failed = len(answered), outcome.skipped.total(), outcome.failed.total()
    if outcome.answered + skipped + failed != total:
        raise UserError(
            f"{directory}: {outcome.answered} answered, {skipped} skipped and {failed} failed are not the {total} "
            "lines of the range; start the same command again"
        )
    _, first, counts = np.unique(id_hashes, return_index=True, return_counts=True)
    outcome.num_duplicate_ids = total - len(first)
    if examples := np.sort(first[counts > 1])[:MAX_DUPLICATE_IDS].tolist():
        records = chain(read_records(directory / ANSWERS), read_records(directory / LEFT_OUT))
        outcome.duplicate_ids = [record.content()["id"] for n, record in enumerate(records) if n in examples]
    return outcome


def summary_table(outcome: Outcome) -> str:
    """A line each for the input, the answers, and the skipped and failed lines by reason."""
    rows = [("input", str(outcome.total), str(outcome.directory))]
    if outcome.num_duplicate_ids:
        examples = ", ".join(outcome.duplicate_ids)
        rows.append(("", str(outcome.num_duplicate_ids), f"of them have the id of an earlier line ({examples})"))
    finishes = outcome.finishes
    notes = [f"{finishes['stop'] + finishes['length']} answers in {ANSWERS}"] if outcome.answered else []
    notes += [f"{finishes['length']} of them cut at their limit"] if finishes["length"] else []
    notes += [f"{finishes['context']} conversations ended by the context"] if finishes["context"] else []
    if outcome.text_only:
        notes += [f"{outcome.text_only} conversations as text only: the server returns no ids, training tokenizes them"]
    rows.append(("answered", str(outcome.answered), "; ".join(notes)))
    for name, reasons in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        rows.append((name, str(reasons.total()), ""))
        shown, others = reasons.most_common()[:MAX_REASONS], reasons.most_common()[MAX_REASONS:]
        rows += [("", str(count), reason) for reason, count in shown]
        if others:
            rows.append(("", str(sum(count for _, count in others)), f"for {len(others)} other reasons"))
    return text_table(rows, "lrl")


def require_success(outcome: Outcome) -> None:
    """Ends the program with an error if lines failed: raises UserError."""
    if outcome.failed:
        reason, _ = outcome.failed.most_common(1)[0]
        raise UserError(
            f"{outcome.failed.total()} of {outcome.total} lines failed, most of them with: {reason}; the same command "
            "tries them again"
        )
