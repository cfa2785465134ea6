"""Checks of a job before anything heavy starts: a run and its plan refuse the same jobs; and ``draft.init_from``."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from nemo_speculative.algorithms.common.draft import Draft, DraftShape
from nemo_speculative.checkpoint.convert import read_foreign
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import DraftConfig, Resume, TrainJob
from nemo_speculative.distributed.parallelism import is_first_rank, num_ranks
from nemo_speculative.serving.versions import check_servable
from nemo_speculative.targets.describe import target_config
from nemo_speculative.training.checkpointer import check_newest
from nemo_speculative.utils.errors import UserError

INIT_NUMBERS = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_layers", "fc_norm",
    "norm_before_fc", "norm_output",
)  # fmt: skip
"""Numbers of the shape that a draft takes from draft.init_from."""


def to_plain_dict(job: Any) -> dict[str, Any]:
    """The job as nested dicts of plain values, as stored with a run."""
    return json.loads(json.dumps(dataclasses.asdict(job), default=lambda enum: enum.value))


def check_output_dir(job: TrainJob) -> None:
    """Raises UserError if output_dir is empty or cannot be used."""
    if not job.output_dir:
        raise UserError("output_dir is empty: name a directory for the run")
    if is_first_rank():
        RunDirectory(job.output_dir).check_usable()


def check_resumed(job: TrainJob) -> None:
    """Raises UserError, on rank 0, if the checkpoint for ``resume=auto`` is damaged or belongs to another run."""
    if job.resume is Resume.auto and is_first_rank():
        check_newest(RunDirectory(job.output_dir), to_plain_dict(job))


def check_target(job: TrainJob) -> tuple[int, int]:
    """Checks that the job fits its target and the number of processes, after :func:`resolve_draft`.

    Returns:
        The longest conversation and the length of a packed row, in tokens.

    Raises:
        UserError: the target cannot be found, or processes, lengths, vocabulary, layers or positions do not fit.
    """
    job.backend.share_of_layers(num_ranks())
    job.data_ranks(num_ranks())
    config = target_config(job.model)
    resolve_draft(job, config)
    max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
    job.draft.check_positions(max_length)
    job.backend.check_target(config, num_ranks())
    if job.parallelism.context > 1:
        check_context_parallel_rope(config)
    return max_length, row_tokens


def check_context_parallel_rope(config: Any) -> None:
    """Raises UserError if ranks that share the tokens of a row would compute different rotary frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if length_dependent := types & {"dynamic", "longrope"}:
        raise UserError(
            f"parallelism.context: the target's rope_type is {length_dependent.pop()}, whose frequencies depend on the "
            "longest position that a rank sees, which differs between ranks; set parallelism.context=1"
        )


def resolve_draft(job: TrainJob, config: Any) -> None:
    """Gives ``job.draft`` the shape of draft.init_from, if any; raises UserError if SGLang could not serve it."""
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


def read_init_from(config: DraftConfig, target_config: Any) -> Servable | None:
    """The draft of ``draft.init_from``, or None; raises UserError if it is unreadable or of another algorithm."""
    if config.init_from is None:
        return None
    start = read_foreign(Path(config.init_from).expanduser(), target_config, getattr(config, "aux_layers", None))
    draft: type = get_class(config._target_)
    if not issubclass(draft, stored := start.contract.draft):
        raise UserError(
            f"draft.init_from: {start.directory} is a {stored.__name__}, and draft._target_ a {draft.__name__}; "
            "choose the draft group of its algorithm"
        )
    return start


def use_init_shape(config: DraftConfig, start: Servable) -> DraftConfig:
    """``config`` with the shape of ``start``; raises UserError if it sets another one."""
    known = {name: getattr(start.shape, name) for name in INIT_NUMBERS if hasattr(config, name)}
    numbers = {name: value for name, value in known.items() if value is not False}
    if hasattr(start.shape, "aux_layers"):
        entries = start.shape.draft_vocab_size
        numbers |= {"aux_layers": list(start.shape.aux_layers), "vocab_size": entries or "target_head"}
    return config.with_numbers(numbers, f"draft.init_from ({start.directory})")


def draft_shape(job: TrainJob, target_config: Any, entries: int) -> DraftShape:
    """Shape of the draft for a target, with ``entries`` in its draft vocabulary."""
    aux_layers = job.draft.chosen_aux_layers(target_config.num_hidden_layers)
    own_head = job.draft.vocabulary(target_config.vocab_size).own_head
    draft: type[Draft] = get_class(job.draft._target_)
    return draft.shape_for(job.draft, target_config, aux_layers, entries if own_head else None)
