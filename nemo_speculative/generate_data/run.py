"""A range of questions, answered by an engine, each answer on disk as it comes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.data.conversation import Conversation
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data import interrupts
from nemo_speculative.generate_data.concurrency import in_parallel
from nemo_speculative.generate_data.engines import CompletionFailed, Engine
from nemo_speculative.generate_data.prompt_file import Item, PromptFile
from nemo_speculative.generate_data.reasoning import Reasoning
from nemo_speculative.generate_data.rollout import Limits, Rollout, Unanswerable, converse
from nemo_speculative.generate_data.shard_dir import FAILED, FORMAT, SKIPPED, Outcome, Part, concluded, opened
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import dir_lock
from nemo_speculative.utils.progress import Progress


def generate_data(job: GenerateJob) -> Outcome:
    """Answers what is not answered yet of a job's range.

    Raises:
        UserError: the input is malformed, what is there was made otherwise, or nobody can answer.
    """
    with interrupts.interruptible() as run:
        questions = PromptFile.of(job)
        directory = Path(job.output) / questions.name
        with dir_lock(directory, "output"):
            _answer(job, questions, directory, run)
            return concluded(directory, len(questions))


def _answer(job: GenerateJob, questions: PromptFile, directory: Path, run: interrupts.Run) -> None:
    engine = engine_of(job)
    try:
        manifest = run(_manifest(job, questions, engine))
        with opened(directory, questions, manifest) as part:
            if part.pending:
                engine.prepare()
                run(Run.of(job, engine, part).all_of(questions))
    finally:
        run(engine.close())


def engine_of(job: GenerateJob) -> Engine:
    """Who answers."""
    sampling = Sampling(job.temperature, job.top_p, job.top_k)
    return get_class(job.engine._target_)(job.engine, job.model, sampling)


async def _manifest(job: GenerateJob, questions: PromptFile, engine: Engine) -> dict[str, Any]:
    """All that the answers depend on."""
    asked = {"input": questions.digest, "input_lines": questions.count, "range": [questions.start, questions.end]}
    sampled = {"top_p": job.top_p, "top_k": job.top_k, "seed": job.seed} if job.temperature else {}
    return {
        "format": FORMAT, **asked, **await engine.identity(), **engine.rendering(), "temperature": job.temperature,
        **sampled, "max_new_tokens": job.max_new_tokens, "max_length": _max_length(job, engine),
        "keep_cut": job.keep_cut, "reasoning": [job.reasoning._target_.rpartition(".")[2], *job.reasoning.tags],
    }  # fmt: skip


def _max_length(job: GenerateJob, engine: Engine) -> int:
    if (job.max_length or 0) > engine.context:
        raise UserError(f"max_length is {job.max_length}: the target's context is {engine.context}; lower it")
    return job.max_length or engine.context


@dataclass(frozen=True)
class Run:
    """The answering of one part."""

    engine: Engine
    part: Part
    limits: Limits
    reasoning: Reasoning
    seed: int
    keep_cut: bool

    @classmethod
    def of(cls, job: GenerateJob, engine: Engine, part: Part) -> "Run":
        limits = Limits(job.max_new_tokens, _max_length(job, engine))
        return cls(engine, part, limits, instantiate(job.reasoning), job.seed, job.keep_cut)

    async def all_of(self, questions: PromptFile) -> None:
        """Answers what the part wants, many conversations at a time."""
        progress = Progress(f"answering {questions.file}", self.part.pending)
        await in_parallel(questions.items(self.part.wants), partial(self._one, progress), self.engine.concurrency)
        progress.close()

    async def _one(self, progress: Progress, question: tuple[int, Item]) -> None:
        index, item = question
        if isinstance(item, Conversation):
            chat_template_of(self.engine.tokenizer)
        try:
            dialogue = Rollout(item, self.engine.tokenizer, self.reasoning)
            await converse(dialogue, self.engine.complete, self.limits, self.seed)
            self._keep(index, dialogue)
        except Unanswerable as error:
            self.part.leave_out(index, item.id, SKIPPED, error.reason)
        except CompletionFailed as error:
            self.part.leave_out(index, item.id, FAILED, error.reason, error.detail, error.attempts)
        progress.advance()

    def _keep(self, index: int, dialogue: Rollout) -> None:
        if not dialogue.num_turns:
            raise Unanswerable(dialogue.item.origin, "no token of it is supervised, so it asks nothing")
        if "length" in dialogue.finish and not self.keep_cut:
            raise Unanswerable(dialogue.item.origin, "an answer was cut at its limit (keep_cut=false)")
        self.part.answer(index, dialogue.record())


def require_success(outcome: Outcome) -> None:
    """Makes lines that failed the program's failure.

    Raises:
        UserError: there are some.
    """
    if outcome.failed:
        reason, _ = outcome.failed.most_common(1)[0]
        raise UserError(
            f"{outcome.failed.total()} of {outcome.asked} lines failed, most of them with: {reason}; the same command "
            "tries them again"
        )
