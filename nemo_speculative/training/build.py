"""From a job to the parts of a run, in the order of the recipe."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf

from nemo_speculative.algorithms.common.draft import Draft, DraftShape
from nemo_speculative.algorithms.common.init_from_target import init_from_target
from nemo_speculative.algorithms.common.objective import Objective
from nemo_speculative.algorithms.common.unroll_objective import UnrollObjective
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import Answers, Resume, TinyModelConfig, TrainJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversations import Conversations
from nemo_speculative.data.loader import PackedLoader
from nemo_speculative.data.packing import collate, pack
from nemo_speculative.data.sources import Split
from nemo_speculative.data.tokenized_dataset import Tokenization, TokenizedDataset, load_or_tokenize
from nemo_speculative.data.vocab_mapping import (
    VocabMapping,
    coverage,
    load_or_build_vocab_mapping,
    vocab_mapping_from_d2t,
)
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.collectives import first_rank_first, is_first_rank, num_ranks, on_first_rank
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.distributed.parallelism import data_rank
from nemo_speculative.evaluation.acceptance import measure_tau, question_prompts
from nemo_speculative.generate_data.answers import answer, unanswered
from nemo_speculative.serving.versions import check_servable
from nemo_speculative.targets import demo
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.describe import TargetDescription, describe_target, target_config
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.background import Background, beside
from nemo_speculative.training.checkpointer import Checkpointer, check_newest
from nemo_speculative.training.init_from import read_start, with_its_shape
from nemo_speculative.training.reporting import Reporter
from nemo_speculative.training.resume_state import Position
from nemo_speculative.training.trainer import DraftTrainer
from nemo_speculative.utils.errors import UserError

VALIDATION_SEED = 1


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run trains on and is measured with."""

    training: TokenizedDataset
    held_out: TokenizedDataset
    row_tokens: int
    prompts: list[list[int]]
    """Held-out questions, for the decoder."""

    @property
    def fingerprint(self) -> str:
        """Tells whether a resumed run sees the same rows."""
        return hashlib.sha256(f"{self.row_tokens} {self.training.fingerprint}".encode()).hexdigest()[:16]


def as_plain(job: Any) -> dict[str, Any]:
    """The job as nested dicts of plain values: what is saved with a run."""
    plain = dataclasses.asdict(
        job, dict_factory=lambda items: {k: v.value if isinstance(v, Enum) else v for k, v in items}
    )
    return json.loads(json.dumps(plain))


def check_output_dir(job: TrainJob) -> None:
    """Before anything heavy starts: the run has a place.

    Raises:
        UserError: it has not.
    """
    if not job.output_dir:
        raise UserError("output_dir is empty: name a directory for the run")
    if is_first_rank():
        RunDirectory(job.output_dir).check_usable()


def prepare_run(job: TrainJob) -> RunDirectory:
    """The run directory; an earlier run there is renamed unless this one resumes it."""
    run = RunDirectory(job.output_dir)
    on_first_rank(lambda: _prepare(job, run))
    return run


def _prepare(job: TrainJob, run: RunDirectory) -> None:
    if job.resume is Resume.never and (aside := run.set_aside()):
        print(f"{run.root} held an earlier run; it is now {aside} (go on with one by resume=auto)", flush=True)
    run.prepare()
    if job.resume is Resume.auto and not run.steps():
        aside = run.set_metrics_aside()
        kept = f"; the metrics that were there are now {aside.name}" if aside else ""
        print(f"resume=auto: no checkpoint in {run.root}, starting from step 0{kept}", flush=True)


def save_config(job: TrainJob, run: RunDirectory) -> None:
    """Writes config.yaml; not before a resumed run was found to be this one."""
    on_first_rank(lambda: (run.root / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(as_plain(job)))))


def check_target(job: TrainJob) -> None:
    """Before anything heavy starts: the target can be had, and the job fits it and the processes.

    Raises:
        UserError: they do not.
    """
    check_ranks(job)
    check_job(job, target_config(job.model))


def check_resumed(job: TrainJob) -> None:
    """Before the target is loaded, by the first rank: what ``resume=auto`` goes on from is whole and of such a run.

    Raises:
        UserError: it is not.
    """
    if job.resume is Resume.auto and is_first_rank():
        check_newest(RunDirectory(job.output_dir), as_plain(job))


def check_ranks(job: TrainJob) -> None:
    """Before the target is looked for: the job can be run by as many processes as there are.

    Raises:
        UserError: it cannot.
    """
    job.backend.share_of_layers(num_ranks())
    job.data_ranks(num_ranks())


def check_job(job: TrainJob, config: Any) -> tuple[int, int]:
    """What a run and its plan refuse alike: lengths, vocabulary, layers and positions that do not fit the target.

    Args:
        config: of the target.

    Returns:
        The longest conversation and the length of a row, in tokens.

    Raises:
        UserError: they do not fit.
    """
    settle_draft(job, config)
    max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
    job.draft.check_positions(max_length)
    job.backend.check_target(config, num_ranks())
    if job.parallelism.context > 1:
        check_sharing(config)
    return max_length, row_tokens


def check_sharing(config: Any) -> None:
    """Ranks that share the tokens of a row compute the same rotary frequencies.

    Raises:
        UserError: they do not.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind.get("rope_type") for kind in (rope, *rope.values()) if isinstance(kind, dict)}
    if changing := kinds & {"dynamic", "longrope"}:
        raise UserError(
            f"parallelism.context: the target's rope_type is {changing.pop()}, whose frequencies follow the longest "
            "position that a rank sees, and every rank sees another one; set parallelism.context=1"
        )


def settle_draft(job: TrainJob, config: Any) -> None:
    """The draft's shape is that of the draft it starts from, if any, and one that can be served.

    Raises:
        UserError: it is not.
    """
    if start := read_start(job.draft, config):
        for note in start.notes:
            print(f"draft.init_from: {note}", flush=True)
        job.draft = with_its_shape(job.draft, start)
    check_servable(draft_shape(job, config, entries=1), job.exporter.sglang_version)
    entries = job.draft.vocabulary(config.vocab_size).entries
    if entries is not None and job.exporter.topk > entries:
        raise UserError(
            f"exporter.topk is {job.exporter.topk}: the draft vocabulary has {entries} entries (draft.vocab_size); "
            "lower exporter.topk"
        )


def build_target(job: TrainJob, device: torch.device) -> Target:
    """The frozen target; made or downloaded by the first rank."""
    directory = first_rank_first(lambda: get_method(job.model._target_)(job.model))
    aux_layers = job.draft.chosen_aux_layers(target_config(job.model).num_hidden_layers)
    return instantiate(
        job.backend,
        path=directory,
        aux_layers=aux_layers,
        dtype=getattr(torch, job.model.dtype.value),
        device=device,
        trust_remote_code=job.model.trust_remote_code,
    )


def build_data(job: TrainJob, target: Target, split: Split) -> RunData:
    """Conversations to documents; with answers=target the target writes every answer first.

    Raises:
        UserError: bad data, or none that is supervised.
    """
    _, row_tokens = job.data.lengths(target.config.max_position_embeddings)
    training, held_out = (_documents(job, target, items, title) for title, items in _sides(job, split).items())
    if not training.rows:
        raise UserError(f"data: no conversation holds a supervised token ({training.report()}); nothing to train on")
    longest_prompt = target.config.max_position_embeddings - 2
    return RunData(training, held_out, row_tokens, question_prompts(held_out.rows, _enough(job), longest_prompt))


def tokenizing(job: TrainJob, split: Split) -> AbstractContextManager[Background]:
    """Tokenises what :func:`build_data` will ask for while the weights are read, on the first rank.

    Not where the target writes the answers, nor before the embedded target is made.
    """
    model = job.model
    there = not isinstance(model, TinyModelConfig) or demo.directory_of(model).exists()
    if torch.distributed.get_rank() or job.data.answers is not Answers.given or not there:
        return beside(lambda go_on: None)
    target = describe_target(model)  # here: what transformers imports on the way is not made for two threads

    def work(go_on: Callable[[], None]) -> None:
        how = _how(job, target)
        for title, items in _sides(job, split).items():
            load_or_tokenize(items, how, job.data, f"tokenising, {title}", go_on)

    return beside(work)


def _sides(job: TrainJob, split: Split) -> dict[str, Conversations]:
    return {"training": split.training, "held out": split.held_out[: 2 * _enough(job)]}


def _enough(job: TrainJob) -> int:
    """Questions that are measured with."""
    return max(job.evaluation.num_questions, job.evaluation.selection_questions)


def _how(job: TrainJob, target: Target | TargetDescription) -> Tokenization:
    max_length, _ = job.data.lengths(target.config.max_position_embeddings)
    return Tokenization(target.tokenizer, target.stop_ids, max_length, target.config.vocab_size)


def load_split(job: TrainJob) -> Split:
    """The conversations of the data group."""
    return get_method(job.data._target_)(job.data, job.seed)


def _documents(job: TrainJob, target: Target, items: Conversations, title: str) -> TokenizedDataset:
    how = _how(job, target)
    if job.data.answers is Answers.given or not items:
        return first_rank_first(lambda: load_or_tokenize(items, how, job.data, f"tokenising, {title}"))
    assert isinstance(target, HFTarget), "the configuration lets no other backend answer"
    rows = first_rank_first(
        lambda: answer(
            target,
            items,
            max_answer_tokens=job.data.max_answer_tokens,
            batch_size=job.data.generation_batch_size,
            max_length=how.max_length,
            cache_dir=f"{job.data.cache_dir}/answers",
            title=f"answering, {title}",
        )
    )
    documents = how(rows)
    documents.unsupervised += unanswered(items, rows)
    return documents


def draft_shape(job: TrainJob, target_config: Any, entries: int) -> DraftShape:
    """The draft's shape for a target, with ``entries`` of draft vocabulary."""
    aux_layers = job.draft.chosen_aux_layers(target_config.num_hidden_layers)
    own_head = job.draft.vocabulary(target_config.vocab_size).own_head
    draft: type[Draft] = get_class(job.draft._target_)
    return draft.shape_for(job.draft, target_config, aux_layers, entries if own_head else None)


def build_draft(job: TrainJob, target: Target, vocabulary: VocabMapping) -> Draft:
    """The draft, initialised from the seed and, where asked, from the target: the same on every rank."""
    torch.manual_seed(job.seed)
    start = read_start(job.draft, target.config)
    # All of its shape: it was trained with its own positions and norms.
    shape = start.shape if start else draft_shape(job, target.config, vocabulary.size)
    draft = get_class(job.draft._target_)(shape).attach(target)
    draft.set_vocab_mapping(vocabulary)
    if start:
        draft.load_state_dict(start.tensors)
    else:
        init_from_target(draft, target, job.draft.init_from_target)
    return draft


def announce(data: RunData, vocabulary: VocabMapping) -> None:
    """Says what was found, once."""
    if torch.distributed.get_rank() == 0:
        print(f"training: {data.training.report()}")
        print(f"held out: {data.held_out.report()}")
        print(
            f"draft vocabulary: {vocabulary.size} of {vocabulary.target_size} ids, "
            f"covering {vocabulary.coverage:.2%} of the supervised tokens",
            flush=True,
        )
        counts = data.training.counts
        for source in counts if len(counts) > 1 else ():
            covered = coverage(counts[source], vocabulary.ids)
            print(
                f"  of {source or 'lines that name no source'}: {covered:.2%} of {int(counts[source].sum())}",
                flush=True,
            )


def build_draft_vocabulary(job: TrainJob, target: Target, training: TokenizedDataset) -> VocabMapping:
    """The most frequent supervised ids of the training rows, or those of the draft that it starts from."""
    start = read_start(job.draft, target.config)
    if start and "d2t" in start.tensors:
        return vocab_mapping_from_d2t(start.tensors["d2t"], training.all_counts)
    return load_or_build_vocab_mapping(training, job.draft.vocabulary(target.config.vocab_size))


def build_objective(job: TrainJob, target: Target, context: ContextGroup = NO_CONTEXT_PARALLELISM) -> Objective:
    objective: type[UnrollObjective] = get_class(job.draft.objective)
    hidden_size = getattr(job.draft, "hidden_size", None) or target.config.hidden_size
    return objective.build(
        target,
        job.draft,
        seed=job.seed,
        tau_steps=job.exporter.num_steps,
        slots_alive=job.trainer.slots(hidden_size, target.device.type),
        context=context,
    )


def build_stream(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> PackedLoader:
    """The training rows of this rank."""
    rank, ranks = data_rank(dims)
    return PackedLoader(
        data.training,
        row_tokens=data.row_tokens,
        global_batch_size=job.trainer.global_batch_size,
        micro_batch_size=job.trainer.micro_batch_size,
        pad_id=_pad_id(target),
        seed=job.seed,
        rank=rank,
        world_size=ranks,
    )


def validation_batches(job: TrainJob, target: Target, data: RunData, dims: titan.ParallelDims) -> list[Batch]:
    """This rank's share of the held-out rows; every rank gets as many batches, the last ones possibly without rows."""
    packed = pack(data.held_out.lengths, data.row_tokens, VALIDATION_SEED)
    share, (rank, ranks) = job.trainer.micro_batch_size, data_rank(dims)
    rows = packed[: job.trainer.val_rows]
    if not rows:
        return []
    mine = rows[rank::ranks]
    count = -(-len(rows) // (share * ranks))
    chunks = [mine[i * share : (i + 1) * share] or [[]] for i in range(count)]
    documents = data.held_out.rows
    return [
        collate([[documents[d] for d in row] for row in chunk], data.row_tokens, _pad_id(target)) for chunk in chunks
    ]


def _pad_id(target: Target) -> int:
    return target.tokenizer.pad_token_id or 0


def build_trainer(
    job: TrainJob, *, target: Target, draft: Draft, objective: Objective, data: RunData, run: RunDirectory,
    dims: titan.ParallelDims, device: torch.device,
) -> DraftTrainer:  # fmt: skip
    """The trainer with everything that it composes."""
    stream = build_stream(job, target, data, dims)
    total_steps = job.trainer.total_steps(len(stream.rows_of(0)))
    first = torch.distributed.get_rank() == 0
    logger = (
        instantiate(job.logger, output_dir=run.root, run_config=as_plain(job), _recursive_=False, _convert_="all")
        if first
        else None
    )
    return DraftTrainer(
        job,
        target=target,
        draft=draft,
        objective=objective,
        stream=stream,
        validation=validation_batches(job, target, data, dims),
        total_steps=total_steps,
        parallel_dims=dims,
        device=device,
        saver=build_saver(job, target, draft, data, run),
        reporter=Reporter(run.root, logger, device, total_steps),
    )


def build_saver(job: TrainJob, target: Target, draft: Draft, data: RunData, run: RunDirectory) -> Checkpointer:
    """What writes the checkpoints of a run, and measures each with the decoder where the target has one."""
    settings = job.exporter.speculative
    prompts = data.prompts[: job.evaluation.selection_questions]
    decoder = target if isinstance(target, HFTarget) and prompts else None

    def measure(servable: Servable) -> float:
        assert decoder is not None
        built = servable.build(decoder.device, getattr(torch, job.model.dtype.value))
        return measure_tau(decoder, built, prompts, settings, job.evaluation)

    return Checkpointer(
        run=run,
        keep=job.trainer.keep_checkpoints,
        draft=type(draft),
        shape=draft.shape,
        provenance=Provenance(str(_target_name(job, target)), target.fingerprint, job.model.dtype.value, settings, 0),
        export_dtype=getattr(torch, (job.exporter.dtype or job.model.dtype).value),
        special_ids={"bos_token_id": target.config.bos_token_id, "eos_token_id": target.config.eos_token_id},
        start=Position(0, {}, as_plain(job), target.fingerprint, data.fingerprint),
        measure=measure if decoder else None,
        minutes=job.trainer.save_minutes,
    )


def _target_name(job: TrainJob, target: Target) -> str | Path:
    """A hub name stays one, so that the checkpoint works on the next machine; a directory is written in full."""
    local = Path(job.model.path).expanduser()
    from_hub = job.model.path.count("/") == 1 and not local.exists() and not job.model.revision
    return job.model.path if from_hub else target.path.resolve()
