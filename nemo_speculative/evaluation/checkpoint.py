"""Evaluation of a checkpoint on disk, with the target, dtype and speculative settings that it records."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from nemo_speculative.checkpoint.convert import as_servable
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.config.schema import EvaluateJob, ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens
from nemo_speculative.data.conversations import ConversationFile
from nemo_speculative.evaluation.acceptance import Evaluation, evaluate_draft, prompt_of
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError

QUESTIONS = "questions.jsonl"
DEFAULT_STEPS = 5
"""Draft tokens of the chain, for a checkpoint of another project that records no settings."""


def evaluate_checkpoint(job: EvaluateJob) -> Evaluation:
    """Evaluates ``job.checkpoint``, this project's or another's, next to plain decoding and n-gram drafting.

    Raises:
        UserError: there is no checkpoint or no question, or the target is not the one that it was trained for.
    """
    if job.draft_class:
        get_class(job.draft_class)
    default = SpeculativeSettings(DEFAULT_STEPS, 1, default_draft_tokens(DEFAULT_STEPS, 1))
    servable, _ = as_servable(Path(job.checkpoint), job.target, default, trust_remote_code=job.trust_remote_code)
    target = _target_of(servable, job)
    prompts = _prompts(job, servable, target)
    draft = servable.build(target.device, getattr(torch, servable.provenance.target_dtype))
    settings = servable.provenance.speculative.with_changes(job.num_steps, job.topk, job.num_draft_tokens)
    return evaluate_draft(target, draft, prompts, settings, job.evaluation.like(_run_evaluation(servable.directory)))


def _run_evaluation(model: Path) -> dict[str, Any]:
    """The ``evaluation`` section in the configuration of the run that wrote the checkpoint; empty without a run."""
    file = next((p / "config.yaml" for p in model.resolve().parents if (p / "config.yaml").is_file()), None)
    run: Any = OmegaConf.to_container(OmegaConf.load(file)) if file else {}
    section = run.get("evaluation") if isinstance(run, dict) else None
    return section if isinstance(section, dict) else {}


def _target_of(servable: Servable, job: EvaluateJob) -> HFTarget:
    provenance = servable.provenance
    directory = resolve_target(ModelConfig(path=job.target or provenance.target), key="target")
    target: HFTarget = instantiate(
        job.backend,
        path=directory,
        aux_layers=servable.aux_layers,
        dtype=getattr(torch, provenance.target_dtype),
        device=choose_device(job.device, "device"),
        trust_remote_code=job.trust_remote_code,
        device_map=job.model.device_map,
        max_memory=job.model.max_memory,
    )
    if target.fingerprint != provenance.target_fingerprint:
        raise UserError(
            f"{servable.directory}: trained for another target than {directory} (fingerprint "
            f"{provenance.target_fingerprint}, found {target.fingerprint}); give its own with target=DIR"
        )
    return target


def _prompts(job: EvaluateJob, servable: Servable, target: HFTarget) -> list[list[int]]:
    file = Path(job.questions) if job.questions else run_questions(servable.directory)
    all_prompts = (prompt_of(row, target.tokenizer) for row in ConversationFile(file, "questions"))
    longest = target.config.max_position_embeddings - 2
    prompts = [prompt for prompt in all_prompts if 0 < len(prompt) <= longest][: job.evaluation.num_questions]
    if not prompts:
        raise UserError(f"questions: {file} holds none of at most {longest} tokens, which the target's context allows")
    if len(prompts) < job.evaluation.num_questions:
        print(
            f"questions: {file} holds {len(prompts)} of at most {longest} tokens, all of them are measured; "
            f"evaluation.num_questions is {job.evaluation.num_questions}",
            flush=True,
        )
    return prompts


def run_questions(model: Path) -> Path:
    """The file of held-out questions in the run directory that contains the checkpoint.

    Raises:
        UserError: the checkpoint is in no run directory.
    """
    run = next((p for p in model.resolve().parents if (p / QUESTIONS).is_file()), None)
    if run is None:
        raise UserError(
            f"questions is not set, and {model} is in no run directory that holds {QUESTIONS}: give questions=FILE"
        )
    return run / QUESTIONS
