"""The end of a run: the best checkpoint measured on held-out questions, beside its baselines."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_speculative.checkpoints.run import RunDirectory
from nemo_speculative.checkpoints.servable import read_servable
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.evaluation.acceptance import Evaluation, evaluate_draft
from nemo_speculative.evaluation.checkpoint import QUESTIONS
from nemo_speculative.evaluation.report import describe
from nemo_speculative.serving.command import sglang_command
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training.parallelism import first_rank_only


def measure_and_summarize(job: TrainJob, target: HFTarget, run: RunDirectory, prompts: Sequence[list[int]]) -> None:
    """Writes ``questions.jsonl`` and ``summary.json`` on the first rank and prints what they say."""
    first_rank_only(lambda: _measure_and_summarize(job, target, run, prompts[: job.evaluation.num_questions]))


def _measure_and_summarize(job: TrainJob, target: HFTarget, run: RunDirectory, prompts: Sequence[list[int]]) -> None:
    servable = read_servable(run.root)
    step = servable.directory.resolve().parent
    # The names are there even where nothing could be measured.
    summary: dict[str, object] = dict.fromkeys(Evaluation.FIGURES)
    if prompts:
        rows = ({"input_ids": p, "loss_mask": [0] * len(p)} for p in prompts)
        (run.root / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluation = evaluate_draft(
            target,
            servable.build(target.device, getattr(torch, job.model.dtype.value)),
            prompts,
            job.exporter.num_steps,
            job.evaluation,
        )
        summary = evaluation.summary()
        print(describe(evaluation))
    else:
        print(
            "no held-out questions: the draft was not measured (data.held_out_path or data.held_out_share gives some)"
        )
    summary |= {"checkpoint": str(step / "model"), "serve_command": sglang_command(step / "model")}
    write_summary(run.root, summary)
    print(f"checkpoint: {step / 'model'}\nserve it:   {summary['serve_command']}", flush=True)


def write_summary(directory: Path, summary: dict[str, object]) -> None:
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
