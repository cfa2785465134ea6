"""The measurement of a checkpoint on disk: it remembers its target, its dtype and its chain."""

import torch
from hydra.utils import get_method, instantiate

from nemo_speculative.checkpoints.servable import Servable, read_servable
from nemo_speculative.config.schema import EvaluateJob, ModelConfig
from nemo_speculative.data.documents import to_documents
from nemo_speculative.devices import choose_device
from nemo_speculative.errors import UserError
from nemo_speculative.evaluation.acceptance import Evaluation, evaluate_draft, question_prompts
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.resolve import resolve_target


def evaluate_checkpoint(job: EvaluateJob) -> Evaluation:
    """Measures ``job.checkpoint`` beside plain decoding and n-gram drafting.

    Raises:
        UserError: no checkpoint there, another target than it was trained for, or no questions.
    """
    servable = read_servable(job.checkpoint)
    target = _target_of(servable, job)
    prompts = _prompts(job, target)
    draft = servable.build(target.device, getattr(torch, servable.provenance.target_dtype))
    num_steps = job.num_steps or servable.provenance.speculative.num_steps
    return evaluate_draft(target, draft, prompts, num_steps, job.evaluation)


def _target_of(servable: Servable, job: EvaluateJob) -> HFTarget:
    remembered = servable.provenance
    directory = resolve_target(ModelConfig(path=job.target or remembered.target))
    target: HFTarget = instantiate(
        job.backend,
        path=directory,
        aux_layers=list(servable.shape.aux_layers),
        dtype=getattr(torch, remembered.target_dtype),
        device=choose_device(job.device, "device"),
        trust_remote_code=job.trust_remote_code,
    )
    if target.fingerprint != remembered.target_fingerprint:
        raise UserError(
            f"{servable.directory}: trained for another target than {directory} (fingerprint "
            f"{remembered.target_fingerprint}, found {target.fingerprint}); give its own with target=DIR"
        )
    return target


def _prompts(job: EvaluateJob, target: HFTarget) -> list[list[int]]:
    split = get_method(job.data._target_)(job.data, job.seed)
    limit = job.evaluation.num_questions
    items = (split.held_out or split.training)[: 2 * limit]
    max_length, _ = job.data.lengths(target.config.max_position_embeddings)
    documents = to_documents(items, target.tokenizer, target.stop_ids, max_length, target.config.vocab_size)
    prompts = question_prompts(documents.rows, limit, target.config.max_position_embeddings - 2)
    if not prompts:
        raise UserError(f"data: no question to measure with ({documents.report()})")
    return prompts
