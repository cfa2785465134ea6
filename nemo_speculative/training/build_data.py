"""Builders of a job's data: tokenized conversations, this rank's loader, and validation batches."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import Answers, TinyModelConfig, TrainJob
from nemo_speculative.data.batch import Batch, PackedLoader, collate, pack
from nemo_speculative.data.conversations import Conversations, Split
from nemo_speculative.data.tokenized_dataset import Tokenization, TokenizedDataset, load_or_tokenize
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import data_rank, first_rank_first
from nemo_speculative.evaluation.acceptance import question_prompts
from nemo_speculative.generate_data.answers import answer, unanswered
from nemo_speculative.targets import demo
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.describe import TargetDescription, describe_target
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.background import BackgroundTask, background_task
from nemo_speculative.utils.errors import UserError

VALIDATION_SEED = 1


@dataclass(frozen=True)
class RunData:
    """Tokenized conversations of a run."""

    training: TokenizedDataset
    held_out: TokenizedDataset
    row_tokens: int
    """Length of a packed row."""

    @property
    def fingerprint(self) -> str:
        """Changes if a resumed run would see other rows."""
        return hashlib.sha256(f"{self.row_tokens} {self.training.fingerprint}".encode()).hexdigest()[:16]


def load_split(job: TrainJob) -> Split:
    """Reads the conversations of the data group."""
    return get_method(job.data._target_)(job.data, job.seed)


def tokenize_in_background(job: TrainJob, split: Split) -> AbstractContextManager[BackgroundTask]:
    """Tokenizes on rank 0, while the weights are loaded, what :func:`build_data` then reads from the cache.

    Does nothing if the target writes the answers, or if the embedded target is still to be made.
    """
    model = job.model
    exists = not isinstance(model, TinyModelConfig) or demo.directory_of(model).exists()
    if torch.distributed.get_rank() or job.data.answers is not Answers.given or not exists:
        return background_task(lambda check_cancelled: None)
    target = describe_target(model)  # not in the thread: transformers' lazy imports are not thread-safe

    def work(check_cancelled: Callable[[], None]) -> None:
        for title, items in _sides(job, split).items():
            load_or_tokenize(items, _tokenization(job, target), job.data, f"tokenizing, {title}", check_cancelled)

    return background_task(work)


def build_data(job: TrainJob, target: Target, split: Split) -> RunData:
    """Tokenizes the conversations; with answers=target the target writes every answer first.

    Raises:
        UserError: the data are malformed, or no token is supervised.
    """
    _, row_tokens = job.data.lengths(target.config.max_position_embeddings)
    training, held_out = (_documents(job, target, items, title) for title, items in _sides(job, split).items())
    if not training.rows:
        raise UserError(f"data: no conversation holds a supervised token ({training.report()}); nothing to train on")
    return RunData(training, held_out, row_tokens)


def held_out_questions(job: TrainJob, target: Target, data: RunData) -> list[list[int]]:
    """Token ids of held-out questions for measuring the draft: the most that any measurement takes."""
    longest = target.config.max_position_embeddings - 2
    return question_prompts(data.held_out.rows, _num_questions(job), longest)


def _sides(job: TrainJob, split: Split) -> dict[str, Conversations]:
    return {"training": split.training, "held out": split.held_out[: 2 * _num_questions(job)]}


def _num_questions(job: TrainJob) -> int:
    return max(job.evaluation.num_questions, job.evaluation.selection_questions)


def _tokenization(job: TrainJob, target: Target | TargetDescription) -> Tokenization:
    max_length, _ = job.data.lengths(target.config.max_position_embeddings)
    return Tokenization(target.tokenizer, target.stop_ids, max_length, target.config.vocab_size)


def _documents(job: TrainJob, target: Target, items: Conversations, title: str) -> TokenizedDataset:
    tokenization = _tokenization(job, target)
    if job.data.answers is Answers.given or not items:
        return first_rank_first(lambda: load_or_tokenize(items, tokenization, job.data, f"tokenizing, {title}"))
    assert isinstance(target, HFTarget), "the configuration lets no other backend answer"
    rows = first_rank_first(
        lambda: answer(
            target,
            items,
            max_answer_tokens=job.data.max_answer_tokens,
            batch_size=job.data.generation_batch_size,
            max_length=tokenization.max_length,
            cache_dir=f"{job.data.cache_dir}/answers",
            title=f"answering, {title}",
        )
    )
    documents = tokenization(rows)
    documents.unsupervised += unanswered(items, rows)
    return documents


def build_loader(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> PackedLoader:
    """Loader of this rank's training rows."""
    rank, ranks = data_rank(dims)
    return PackedLoader(
        data.training,
        packed_length=data.row_tokens,
        global_batch_size=job.trainer.global_batch_size,
        micro_batch_size=job.trainer.micro_batch_size,
        pad_id=_pad_id(target),
        seed=job.seed,
        rank=rank,
        world_size=ranks,
    )


def validation_batches(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> list[Batch]:
    """This rank's batches of held-out rows; every rank has equally many, the last ones possibly empty."""
    rows = pack(data.held_out.lengths, data.row_tokens, VALIDATION_SEED)[: job.trainer.val_rows]
    if not rows:
        return []
    size, (rank, ranks) = job.trainer.micro_batch_size, data_rank(dims)
    own_rows, count = rows[rank::ranks], -(-len(rows) // (size * ranks))
    chunks = [own_rows[i * size : (i + 1) * size] or [[]] for i in range(count)]
    documents = data.held_out.rows
    return [
        collate([[documents[d] for d in row] for row in chunk], data.row_tokens, _pad_id(target)) for chunk in chunks
    ]


def _pad_id(target: Target) -> int:
    return target.tokenizer.pad_token_id or 0
