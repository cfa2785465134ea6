"""Checks of a job before anything heavy starts; a run and its plan refuse the same jobs."""

import dataclasses
import json
from enum import Enum
from typing import Any

from hydra.utils import get_class

from nemo_speculative.algorithms.common.draft import Draft, DraftShape
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.distributed.parallelism import is_first_rank, num_ranks
from nemo_speculative.serving.versions import check_servable
from nemo_speculative.targets.describe import target_config
from nemo_speculative.training.checkpointer import check_newest
from nemo_speculative.training.init_from import read_init_from, use_init_shape
from nemo_speculative.utils.errors import UserError


def to_plain_dict(job: Any) -> dict[str, Any]:
    """The job as nested dicts of plain values, as stored with a run."""
    plain = dataclasses.asdict(
        job, dict_factory=lambda items: {k: v.value if isinstance(v, Enum) else v for k, v in items}
    )
    return json.loads(json.dumps(plain))


def check_output_dir(job: TrainJob) -> None:
    """
    Raises:
        UserError: output_dir is empty or cannot be used.
    """
    if not job.output_dir:
        raise UserError("output_dir is empty: name a directory for the run")
    if is_first_rank():
        RunDirectory(job.output_dir).check_usable()


def check_target(job: TrainJob) -> None:
    """
    Raises:
        UserError: the target cannot be found, or the job does not fit it or the number of processes.
    """
    check_ranks(job)
    check_job(job, target_config(job.model))


def check_resumed(job: TrainJob) -> None:
    """Checks the checkpoint from which ``resume=auto`` resumes, on rank 0.

    Raises:
        UserError: the checkpoint is damaged or belongs to another run.
    """
    if job.resume is Resume.auto and is_first_rank():
        check_newest(RunDirectory(job.output_dir), to_plain_dict(job))


def check_ranks(job: TrainJob) -> None:
    """
    Raises:
        UserError: the job cannot run on this number of processes.
    """
    job.backend.share_of_layers(num_ranks())
    job.data_ranks(num_ranks())


def check_job(job: TrainJob, config: Any) -> tuple[int, int]:
    """Checks a job against its target's ``config``, after :func:`resolve_draft`.

    Returns:
        The longest conversation and the length of a packed row, in tokens.

    Raises:
        UserError: lengths, vocabulary, layers or positions do not fit.
    """
    resolve_draft(job, config)
    max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
    job.draft.check_positions(max_length)
    job.backend.check_target(config, num_ranks())
    if job.parallelism.context > 1:
        check_context_parallel_rope(config)
    return max_length, row_tokens


def check_context_parallel_rope(config: Any) -> None:
    """
    Raises:
        UserError: ranks that share the tokens of a row would compute different rotary frequencies.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if length_dependent := types & {"dynamic", "longrope"}:
        raise UserError(
            f"parallelism.context: the target's rope_type is {length_dependent.pop()}, whose frequencies depend on the "
            "longest position that a rank sees, which differs between ranks; set parallelism.context=1"
        )


def resolve_draft(job: TrainJob, config: Any) -> None:
    """Gives ``job.draft`` the shape of the draft that draft.init_from names, if any.

    Raises:
        UserError: SGLang could not serve the draft.
    """
    if start := read_init_from(job.draft, config):
        for note in start.notes:
            print(f"draft.init_from: {note}", flush=True)
        job.draft = use_init_shape(job.draft, start)
    check_servable(draft_shape(job, config, entries=1), job.exporter.sglang_version)
    entries = job.draft.vocabulary(config.vocab_size).entries
    if entries is not None and job.exporter.topk > entries:
        raise UserError(
            f"exporter.topk is {job.exporter.topk}: the draft vocabulary has {entries} entries (draft.vocab_size); "
            "lower exporter.topk"
        )


def draft_shape(job: TrainJob, target_config: Any, entries: int) -> DraftShape:
    """Shape of the draft for a target, with ``entries`` in its draft vocabulary."""
    aux_layers = job.draft.chosen_aux_layers(target_config.num_hidden_layers)
    own_head = job.draft.vocabulary(target_config.vocab_size).own_head
    draft: type[Draft] = get_class(job.draft._target_)
    return draft.shape_for(job.draft, target_config, aux_layers, entries if own_head else None)
