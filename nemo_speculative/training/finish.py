"""The end of a run: the best checkpoint measured on held-out questions, beside its baselines."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.metadata import find_model, update_speculative_settings
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.distributed.collectives import on_first_rank
from nemo_speculative.evaluation.acceptance import Evaluation, evaluate_draft
from nemo_speculative.evaluation.checkpoint import QUESTIONS
from nemo_speculative.evaluation.report import describe
from nemo_speculative.evaluation.widths import cheapest, describe_widths, measure_widths
from nemo_speculative.serving.command import sglang_command
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.hf import HFTarget


def save_questions(run: RunDirectory, prompts: Sequence[list[int]]) -> None:
    """Writes ``questions.jsonl``, before the first checkpoint: each of them can be measured while training goes on."""
    rows = [json.dumps({"input_ids": p, "loss_mask": [0] * len(p)}) + "\n" for p in prompts]
    if rows:
        on_first_rank(lambda: (run.root / QUESTIONS).write_text("".join(rows)))


def measure_and_summarize(job: TrainJob, target: Target, run: RunDirectory, prompts: Sequence[list[int]]) -> None:
    """Writes ``summary.json`` on the first rank and prints what it says."""
    on_first_rank(lambda: _measure_and_summarize(job, target, run, prompts[: job.evaluation.num_questions]))


def _measure_and_summarize(job: TrainJob, target: Target, run: RunDirectory, prompts: Sequence[list[int]]) -> None:
    servable = read_servable(run.root)
    step = servable.directory.resolve().parent
    # The names are there even where nothing could be measured.
    summary: dict[str, object] = dict.fromkeys(Evaluation.FIGURES)
    if prompts and isinstance(target, HFTarget):
        evaluation = _measure(job, target, run, servable, prompts)
        summary = evaluation.summary()
        print(describe(evaluation))
    elif prompts:
        measuring = f"python recipes/evaluate.py checkpoint={shlex.quote(str(run.root))}"
        print(f"the draft was not measured, as only backend=hf decodes; to measure it: {measuring}")
    else:
        print(
            "no held-out questions: the draft was not measured (data.held_out_path or data.held_out_share gives some)"
        )
    summary |= {"checkpoint": str(step / "model"), "serve_command": sglang_command(step / "model")}
    write_summary(run.root, summary)
    print(f"checkpoint: {step / 'model'}\nserve it:   {summary['serve_command']}", flush=True)
    if not torch.accelerator.is_available():
        print(
            f"on a CPU:   python -m nemo_speculative.serve_sglang --draft {shlex.quote(str(run.root))} --device cpu   "
            "(in the environment of SGLang: docs/serving.md)",
            flush=True,
        )


def _measure(
    job: TrainJob, target: HFTarget, run: RunDirectory, servable: Servable, prompts: Sequence[list[int]]
) -> Evaluation:
    draft = servable.build(target.device, getattr(torch, job.model.dtype.value))
    settings = servable.provenance.speculative
    if job.exporter.measure_width:
        settings = choose_width(job, target, draft, prompts)
        for checkpoint in {servable.directory, find_model(run.root / "checkpoints" / "latest")}:
            update_speculative_settings(checkpoint, settings)
    return evaluate_draft(target, draft, prompts, settings, job.evaluation)


def choose_width(job: TrainJob, target: HFTarget, draft: Draft, prompts: Sequence[list[int]]) -> SpeculativeSettings:
    """The speculative settings whose trees cost the least time per token, and the table that says so."""
    exporter, questions = job.exporter, prompts[: job.evaluation.selection_questions]
    widths = measure_widths(target, draft, questions, exporter.num_steps, exporter.topk, job.evaluation)
    print(describe_widths(widths))
    return cheapest(widths).settings


def write_summary(directory: Path, summary: dict[str, object]) -> None:
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
