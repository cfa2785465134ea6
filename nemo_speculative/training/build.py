"""Builders of the parts of a run from its job, in the order of the recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf

from nemo_speculative.algorithms.common.draft import Draft, init_from_target
from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.data.vocab_mapping import (
    VocabMapping,
    coverage,
    load_or_build_vocab_mapping,
    vocab_mapping_from_d2t,
)
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM, ContextGroup
from nemo_speculative.distributed.parallelism import first_rank_first, on_first_rank
from nemo_speculative.evaluation.acceptance import measure_tau
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.describe import target_config
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.build_data import RunData, build_loader, validation_batches
from nemo_speculative.training.checkpointer import Checkpointer, ResumeMetadata
from nemo_speculative.training.checks import draft_shape, to_plain_dict
from nemo_speculative.training.init_from import read_init_from
from nemo_speculative.training.metrics import MetricsLogger
from nemo_speculative.training.trainer import DraftTrainer


def build_target(job: TrainJob, device: torch.device) -> Target:
    """The frozen target; rank 0 makes or downloads it."""
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


def build_draft_vocabulary(job: TrainJob, target: Target, training: TokenizedDataset) -> VocabMapping:
    """The most frequent supervised ids of the training rows, or the vocabulary of draft.init_from."""
    start = read_init_from(job.draft, target.config)
    if start and "d2t" in start.tensors:
        return vocab_mapping_from_d2t(start.tensors["d2t"], training.all_counts)
    return load_or_build_vocab_mapping(training, job.draft.vocabulary(target.config.vocab_size))


def print_data_report(data: RunData, vocabulary: VocabMapping) -> None:
    """Prints, on rank 0, sizes of the data and coverage of the draft vocabulary."""
    if torch.distributed.get_rank():
        return
    print(f"training: {data.training.report()}")
    print(f"held out: {data.held_out.report()}")
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
    objective: type[TTTObjective] = get_class(job.draft.objective)
    hidden_size = getattr(job.draft, "hidden_size", None) or target.config.hidden_size
    return objective(
        target,
        job.draft,
        seed=job.seed,
        tau_steps=job.exporter.num_steps,
        chunk_slots=job.trainer.slots(hidden_size, target.device.type),
        context=context,
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


def save_config(job: TrainJob, run: RunDirectory) -> None:
    """Writes config.yaml; call it only once a resumed run is known to have this configuration."""
    config: Any = OmegaConf.create(to_plain_dict(job))
    on_first_rank(lambda: (run.root / "config.yaml").write_text(OmegaConf.to_yaml(config)))


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
        job,
        target=target,
        draft=draft,
        objective=objective,
        loader=loader,
        validation=validation_batches(job, target, data, dims),
        total_steps=total_steps,
        parallel_dims=dims,
        device=device,
        checkpointer=_build_checkpointer(job, target, draft, data, questions, run),
        metrics=MetricsLogger(run.root, logger, device, total_steps),
    )


def _build_checkpointer(
    job: TrainJob, target: Target, draft: Draft, data: RunData, questions: Sequence[list[int]], run: RunDirectory
) -> Checkpointer:
    """Writes the run's checkpoints, and measures each with the decoder if the target can decode."""
    settings = job.exporter.speculative
    selection = questions[: job.evaluation.selection_questions]
    decoder = target if isinstance(target, HFTarget) and selection else None

    def measure(servable: Servable) -> float:
        assert decoder is not None
        exported = servable.build(decoder.device, getattr(torch, job.model.dtype.value))
        return measure_tau(decoder, exported, selection, settings, job.evaluation)

    # The name of a hub model is kept, so that the checkpoint works on another machine; a directory becomes absolute.
    local = Path(job.model.path).expanduser()
    from_hub = job.model.path.count("/") == 1 and not local.exists() and not job.model.revision
    target_name = job.model.path if from_hub else str(target.path.resolve())
    return Checkpointer(
        run=run,
        keep=job.trainer.keep_checkpoints,
        draft=type(draft),
        shape=draft.shape,
        provenance=Provenance(target_name, target.fingerprint, job.model.dtype.value, settings, 0),
        export_dtype=getattr(torch, (job.exporter.dtype or job.model.dtype).value),
        special_ids={"bos_token_id": target.config.bos_token_id, "eos_token_id": target.config.eos_token_id},
        start=ResumeMetadata(0, {}, to_plain_dict(job), target.fingerprint, data.fingerprint),
        measure=measure if decoder else None,
    )
