"""The training recipe: from a job to a measured checkpoint."""

import json
import shlex
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import torch

from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.metadata import find_model, update_speculative_settings
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.distributed import parallelism
from nemo_speculative.distributed.health import Heartbeat, report_lost_ranks
from nemo_speculative.evaluation import acceptance
from nemo_speculative.serving.command import sglang_command
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import build, checks
from nemo_speculative.training.build import build_data, load_split
from nemo_speculative.training.plan import describe
from nemo_speculative.utils.devices import choose_device


def train(job: TrainJob) -> None:
    """Trains the draft of ``job``, measures it and writes ``summary.json``; with ``plan=true`` only prints an estimate.

    Raises:
        UserError: bad input, a loss that is not finite, or another rank is gone.
        SystemExit: after a signal; a checkpoint was saved.
    """
    if job.plan:
        return print(describe(job)) if parallelism.is_first_rank() else None
    checks.check_output_dir(job)
    checks.check_target(job)
    checks.check_resumed(job)
    split = load_split(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with (
        parallelism.process_group(device, job.parallelism) as dims,
        closing(Heartbeat(partial(print, flush=True))) as heartbeat,
        report_lost_ranks(heartbeat),
    ):
        with (
            parallelism.fast_float32_matmuls(device),
            build.tokenize_in_background(job, split) as tokenization,
            closing(build.build_target(job, device)) as target,
        ):
            parallelism.on_first_rank(tokenization.wait)
            data = build_data(job, target, split)
            questions = build.held_out_questions(job, target, data)
            evaluated = questions[: job.evaluation.num_questions]
            target.expect(data.training.rows, data.held_out.rows)
            vocabulary = parallelism.first_rank_first(partial(build.build_draft_vocabulary, job, target, data.training))
            build.print_data_report(data, vocabulary)
            draft = build.build_draft(job, target, vocabulary)
            objective = build.build_objective(job, target, parallelism.context_group(dims))
            run = build.prepare_run_dir(job)
            trainer = build.build_trainer(
                job, target=target, draft=draft, objective=objective, data=data, questions=questions, run=run,
                dims=dims, device=device,
            )  # fmt: skip
            heartbeat.get_progress = trainer.progress
            with closing(trainer):
                if job.resume is Resume.auto:
                    trainer.resume()
                build.save_config(job, run)
                parallelism.on_first_rank(lambda: save_questions(run, evaluated))
                trainer.train()
        parallelism.on_first_rank(lambda: measure_and_summarize(job, target, run, evaluated))
    return None


def save_questions(run: RunDirectory, questions: Sequence[list[int]]) -> None:
    """Writes ``questions.jsonl`` before the first checkpoint, so that each can be measured while training runs."""
    rows = [json.dumps({"input_ids": q, "loss_mask": [0] * len(q)}) + "\n" for q in questions]
    if rows:
        (run.root / acceptance.QUESTIONS).write_text("".join(rows))


def measure_and_summarize(job: TrainJob, target: Target, run: RunDirectory, questions: Sequence[list[int]]) -> None:
    """Measures the best checkpoint next to its baselines, writes ``summary.json`` and prints it."""
    servable, root = read_servable(run.root), shlex.quote(str(run.root))
    model = servable.directory.resolve().parent / "model"
    summary: dict[str, object] = dict.fromkeys(acceptance.Evaluation.FIGURES)  # None where nothing could be measured
    if questions and isinstance(target, HFTarget):
        evaluation = _measure(job, target, run, servable, questions)
        summary = evaluation.summary()
        print(acceptance.describe(evaluation))
    elif questions:
        command = f"python recipes/evaluate.py checkpoint={root}"
        print(f"the draft was not measured, as only backend=hf decodes; to measure it: {command}")
    else:
        print(
            "no held-out questions: the draft was not measured (data.held_out_path or data.held_out_share gives some)"
        )
    summary |= {"checkpoint": str(model), "serve_command": sglang_command(model)}
    (run.root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"checkpoint: {model}\nserve it:   {summary['serve_command']}", flush=True)
    if not torch.accelerator.is_available():
        print(
            f"on a CPU:   python -m nemo_speculative.serve_sglang --draft {root} --device cpu   "
            "(in the environment of SGLang: docs/serving.md)",
            flush=True,
        )


def _measure(
    job: TrainJob, target: HFTarget, run: RunDirectory, servable: Servable, questions: Sequence[list[int]]
) -> acceptance.Evaluation:
    """Measures the draft; with exporter.measure_width first chooses the tree that costs the least time per token."""
    draft = servable.build(target.device, getattr(torch, job.model.dtype.value))
    settings, exporter = servable.provenance.speculative, job.exporter
    if exporter.measure_width:
        selection = questions[: job.evaluation.selection_questions]
        widths = acceptance.measure_widths(target, draft, selection, exporter.num_steps, exporter.topk, job.evaluation)
        print(acceptance.describe_widths(widths))
        settings = acceptance.cheapest(widths)
        for checkpoint in {servable.directory, find_model(run.root / "checkpoints" / "latest")}:
            update_speculative_settings(checkpoint, settings)
    return acceptance.evaluate_draft(target, draft, questions, settings, job.evaluation)
