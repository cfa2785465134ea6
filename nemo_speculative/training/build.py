"""Builders of the parts of a run from its job, in the order of the recipe."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf

from nemo_speculative.algorithms.common.draft import Draft, init_from_target
from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.checkpoint.draft_checkpoint import Servable, write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import Answers, Resume, TinyModelConfig, TrainJob
from nemo_speculative.data.batch import Batch, PackedLoader, collate, pack
from nemo_speculative.data.conversations import Conversations, Split
from nemo_speculative.data.tokenized_dataset import Tokenization, TokenizedDataset, load_or_tokenize
from nemo_speculative.data.vocab_mapping import (
    VocabMapping,
    build_and_store_vocab_mapping,
    coverage,
    vocab_mapping_from_d2t,
)
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.distributed.parallelism import data_rank, first_rank_first, on_first_rank
from nemo_speculative.evaluation.acceptance import measure_tau, question_prompts
from nemo_speculative.generate_data.answers import answer, unanswered
from nemo_speculative.targets import demo
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.describe import TargetDescription, describe_target, target_config
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.checkpointer import Checkpointer, ResumeMetadata
from nemo_speculative.training.checks import draft_shape, read_init_from, to_plain_dict
from nemo_speculative.training.metrics import MetricsLogger
from nemo_speculative.training.trainer import DraftTrainer
from nemo_speculative.utils.background import BackgroundTask, background_task
from nemo_speculative.utils.errors import UserError

VALIDATION_SEED = 1


def load_split(job: TrainJob) -> Split:
    """Reads the conversations of the data group."""
    return get_method(job.data._target_)(job.data, job.seed)


def tokenize_in_background(job: TrainJob, split: Split) -> AbstractContextManager[BackgroundTask]:
    """Tokenizes on rank 0, while the weights are loaded, what :func:`build_data` then reads from the cache.

    Does nothing if the target writes the answers, or if the embedded target is still to be made.
    """
    exists = not isinstance(job.model, TinyModelConfig) or demo.directory_of(job.model).exists()
    if torch.distributed.get_rank() or job.data.answers is not Answers.given or not exists:
        return background_task(lambda check_cancelled: None)
    target = describe_target(job.model)  # not in the thread: transformers' lazy imports are not thread-safe

    def work(check_cancelled: Callable[[], None]) -> None:
        for title, items in _sides(job, split).items():
            load_or_tokenize(items, _tokenization(job, target), job.data, f"tokenizing, {title}", check_cancelled)

    return background_task(work)


def build_target(job: TrainJob, device: torch.device) -> Target:
    """The frozen target; rank 0 makes or downloads it."""
    return instantiate(
        job.backend,
        path=first_rank_first(lambda: get_method(job.model._target_)(job.model)),
        aux_layers=job.draft.chosen_aux_layers(target_config(job.model).num_hidden_layers),
        dtype=getattr(torch, job.model.dtype.value),
        device=device,
        trust_remote_code=job.model.trust_remote_code,
    )


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
            target, items, max_answer_tokens=job.data.max_answer_tokens, batch_size=job.data.generation_batch_size,
            max_length=tokenization.max_length, cache_dir=f"{job.data.cache_dir}/answers", title=f"answering, {title}",
        )
    )  # fmt: skip
    documents = tokenization(rows)
    documents.unsupervised += unanswered(items, rows)
    return documents


def build_draft_vocabulary(job: TrainJob, target: Target, training: TokenizedDataset) -> VocabMapping:
    """The most frequent supervised ids of the training rows, or the vocabulary of draft.init_from."""
    start = read_init_from(job.draft, target.config)
    if start and "d2t" in start.tensors:
        return vocab_mapping_from_d2t(start.tensors["d2t"], training.all_counts)
    return build_and_store_vocab_mapping(training, job.draft.vocabulary(target.config.vocab_size))


def print_data_report(data: RunData, vocabulary: VocabMapping) -> None:
    """Prints, on rank 0, sizes of the data and coverage of the draft vocabulary."""
    if torch.distributed.get_rank():
        return
    print(f"training: {data.training.report()}\nheld out: {data.held_out.report()}")
    print(
        f"draft vocabulary: {vocabulary.size} of {vocabulary.target_size} ids, "
        f"covering {vocabulary.coverage:.2%} of the supervised tokens",
        flush=True,
    )
    counts = data.training.counts
    for source in counts if len(counts) > 1 else ():
        covered, name = coverage(counts[source], vocabulary.ids), source or "lines that name no source"
        print(f"  of {name}: {covered:.2%} of {int(counts[source].sum())}", flush=True)


def build_draft(job: TrainJob, target: Target, vocabulary: VocabMapping) -> Draft:
    """The draft, initialized from the seed and, if configured, the target or draft.init_from; equal on all ranks."""
    torch.manual_seed(job.seed)
    start = read_init_from(job.draft, target.config)
    # The full shape of draft.init_from: it was trained with its own positions and norms.
    shape = start.shape if start else draft_shape(job, target.config, vocabulary.size)
    draft = get_class(job.draft._target_)(shape).attach(target)
    draft.set_vocab_mapping(vocabulary)
    if start:
        draft.load_state_dict(start.tensors)
    else:
        init_from_target(draft, target, job.draft.init_from_target)
    return draft


def build_objective(job: TrainJob, target: Target, context: ContextGroup = NO_CONTEXT_PARALLELISM) -> TTTObjective:
    """The training objective that goes with the draft."""
    hidden_size = getattr(job.draft, "hidden_size", None) or target.config.hidden_size
    slots = job.trainer.slots(hidden_size, target.device.type)
    objective: type[TTTObjective] = get_class(job.draft.objective)
    return objective(
        target, job.draft, seed=job.seed, tau_steps=job.exporter.num_steps, chunk_slots=slots, context=context
    )


def prepare_run_dir(job: TrainJob) -> RunDirectory:
    """Creates the run directory; an earlier run there is renamed unless this one resumes it."""
    run = RunDirectory(job.output_dir)

    def prepare() -> None:
        if job.resume is Resume.never and (renamed := run.set_aside()):
            print(f"{run.root} held an earlier run; it is now {renamed} (resume=auto resumes one)", flush=True)
        run.prepare()
        if job.resume is Resume.auto and not run.steps():
            renamed = run.set_metrics_aside()
            note = f"; the metrics that were there are now {renamed.name}" if renamed else ""
            print(f"resume=auto: no checkpoint in {run.root}, starting from step 0{note}", flush=True)

    on_first_rank(prepare)
    return run


def build_trainer(
    job: TrainJob, *, target: Target, draft: Draft, objective: TTTObjective, data: RunData,
    questions: Sequence[list[int]], run: RunDirectory, dims: titan.ParallelDims, device: torch.device,
) -> DraftTrainer:  # fmt: skip
    """The trainer with all its parts."""
    loader = build_loader(job, target, data, dims)
    total_steps = job.trainer.total_steps(len(loader.rows_of(0)))
    logger = None
    if torch.distributed.get_rank() == 0:
        config = to_plain_dict(job)
        logger = instantiate(job.logger, output_dir=run.root, run_config=config, _recursive_=False, _convert_="all")
    return DraftTrainer(
        job, target=target, draft=draft, objective=objective, loader=loader,
        validation=_validation_batches(job, target, data, dims), total_steps=total_steps, parallel_dims=dims,
        device=device, checkpointer=_build_checkpointer(job, target, draft, data, questions, run),
        metrics=MetricsLogger(run.root, logger, device, total_steps),
    )  # fmt: skip


def build_loader(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> PackedLoader:
    """Loader of this rank's training rows."""
    rank, ranks = data_rank(dims)
    return PackedLoader(
        data.training, packed_length=data.row_tokens, global_batch_size=job.trainer.global_batch_size,
        micro_batch_size=job.trainer.micro_batch_size, pad_id=_pad_id(target), seed=job.seed, rank=rank,
        world_size=ranks,
    )  # fmt: skip


def rank_batches(rows: Sequence[list[int]], size: int, rank: int, ranks: int) -> list[list[list[int]]]:
    """A rank's batches of ``size`` rows; every rank has equally many, the last ones possibly with one empty row."""
    own_rows, count = rows[rank::ranks], -(-len(rows) // (size * ranks))
    return [list(own_rows[n * size : (n + 1) * size]) or [[]] for n in range(count)]


def _validation_batches(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> list[Batch]:
    """This rank's batches of held-out rows."""
    rows, documents = pack(data.held_out.lengths, data.row_tokens, VALIDATION_SEED), data.held_out.rows
    return [
        collate([[documents[d] for d in row] for row in batch], data.row_tokens, _pad_id(target))
        for batch in rank_batches(rows[: job.trainer.val_rows], job.trainer.micro_batch_size, *data_rank(dims))
    ]


def _pad_id(target: Target) -> int:
    return target.tokenizer.pad_token_id or 0


def _build_checkpointer(
    job: TrainJob, target: Target, draft: Draft, data: RunData, questions: Sequence[list[int]], run: RunDirectory
) -> Checkpointer:
    """Writes the run's checkpoints, and measures each with the decoder if the target can decode."""
    settings, dtype = job.exporter.speculative, getattr(torch, job.model.dtype.value)
    selection = questions[: job.evaluation.selection_questions]

    def measure(servable: Servable) -> float:
        assert isinstance(target, HFTarget)
        return measure_tau(target, servable.build(target.device, dtype), selection, settings, job.evaluation)

    # The name of a hub model is kept, so that the checkpoint works on another machine; a directory becomes absolute.
    local = Path(job.model.path).expanduser()
    from_hub = job.model.path.count("/") == 1 and not local.exists() and not job.model.revision
    target_name = job.model.path if from_hub else str(target.path.resolve())
    export_dtype = getattr(torch, (job.exporter.dtype or job.model.dtype).value)
    special_ids = {"bos_token_id": target.config.bos_token_id, "eos_token_id": target.config.eos_token_id}

    def export(directory: Path, weights: dict[str, torch.Tensor], step: int) -> None:
        provenance = Provenance(target_name, target.fingerprint, job.model.dtype.value, settings, step)
        write_servable(directory, type(draft), weights, draft.shape, provenance, export_dtype, special_ids)

    return Checkpointer(
        run=run,
        keep=job.trainer.keep_checkpoints,
        export=export,
        start=ResumeMetadata(0, {}, to_plain_dict(job), target.fingerprint, data.fingerprint),
        measure=measure if isinstance(target, HFTarget) and selection else None,
    )


def save_config(job: TrainJob, run: RunDirectory) -> None:
    """Writes config.yaml; call it only once a resumed run is known to have this configuration."""
    config: Any = OmegaConf.create(to_plain_dict(job))
    on_first_rank(lambda: (run.root / "config.yaml").write_text(OmegaConf.to_yaml(config)))
