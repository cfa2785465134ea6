"""The measurement of a checkpoint on disk: it remembers its target, its dtype and its chain."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from nemo_speculative.checkpoint.convert import as_servable
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.config.schema import EvaluateJob, ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens
from nemo_speculative.data.conversation import read_jsonl
from nemo_speculative.evaluation.acceptance import Evaluation, evaluate_draft, prompt_of
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError

QUESTIONS = "questions.jsonl"
CHAIN = 5
"""Draft tokens where a checkpoint of another project does not say."""


def evaluate_checkpoint(job: EvaluateJob) -> Evaluation:
    """Measures ``job.checkpoint``, this project's or another's, beside plain decoding and n-gram drafting.

    Raises:
        UserError: no checkpoint there, another target than it was trained for, or no questions.
    """
    if job.draft_class:
        get_class(job.draft_class)
    settings = SpeculativeSettings(CHAIN, 1, default_draft_tokens(CHAIN, 1))
    servable, _ = as_servable(Path(job.checkpoint), job.target, settings, trust_remote_code=job.trust_remote_code)
    target = _target_of(servable, job)
    prompts = _prompts(job, servable, target)
    draft = servable.build(target.device, getattr(torch, servable.provenance.target_dtype))
    settings = servable.provenance.speculative.with_changes(job.num_steps, job.topk, job.num_draft_tokens)
    return evaluate_draft(target, draft, prompts, settings, job.evaluation.like(_run_evaluation(servable.directory)))


def _run_evaluation(model: Path) -> dict[str, Any]:
    """How the run measured in which the checkpoint lies; nothing where it lies in none."""
    file = next((p / "config.yaml" for p in model.resolve().parents if (p / "config.yaml").is_file()), None)
    run: Any = OmegaConf.to_container(OmegaConf.load(file)) if file else {}
    found = run.get("evaluation") if isinstance(run, dict) else None
    return found if isinstance(found, dict) else {}


def _target_of(servable: Servable, job: EvaluateJob) -> HFTarget:
    remembered = servable.provenance
    directory = resolve_target(ModelConfig(path=job.target or remembered.target), key="target")
    target: HFTarget = instantiate(
        job.backend,
        path=directory,
        aux_layers=servable.aux_layers,
        dtype=getattr(torch, remembered.target_dtype),
        device=choose_device(job.device, "device"),
        trust_remote_code=job.trust_remote_code,
        device_map=job.model.device_map,
        max_memory=job.model.max_memory,
    )
    if target.fingerprint != remembered.target_fingerprint:
        raise UserError(
            f"{servable.directory}: trained for another target than {directory} (fingerprint "
            f"{remembered.target_fingerprint}, found {target.fingerprint}); give its own with target=DIR"
        )
    return target


def _prompts(job: EvaluateJob, servable: Servable, target: HFTarget) -> list[list[int]]:
    file = Path(job.questions) if job.questions else run_questions(servable.directory)
    asked = (prompt_of(row, target.tokenizer) for row in read_jsonl(file, "questions"))
    longest = target.config.max_position_embeddings - 2
    prompts = [prompt for prompt in asked if 0 < len(prompt) <= longest][: job.evaluation.num_questions]
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
    """The held-out questions that a run left beside its checkpoints.

    Raises:
        UserError: the checkpoint does not lie in a run directory.
    """
    run = next((p for p in model.resolve().parents if (p / QUESTIONS).is_file()), None)
    if run is None:
        raise UserError(f"questions is not set, and {model} lies in no run that holds {QUESTIONS}: give questions=FILE")
    return run / QUESTIONS
