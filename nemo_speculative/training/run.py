"""What every training recipe does, from a job to a measured checkpoint."""

from contextlib import closing
from functools import partial

from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.distributed.collectives import first_rank_first, is_first_rank, on_first_rank
from nemo_speculative.distributed.health import Heartbeat, report_lost_ranks
from nemo_speculative.distributed.parallelism import context_group, fast_float32_matmuls, process_group
from nemo_speculative.training import build
from nemo_speculative.training.finish import measure_and_summarize, save_questions
from nemo_speculative.training.plan import describe
from nemo_speculative.utils.devices import choose_device


def train(job: TrainJob) -> None:
    """Trains the draft of ``job``, measures it and writes ``summary.json``; with ``plan=true`` says what it would do.

    Raises:
        UserError: bad input, a loss that is not finite, or another rank is gone.
        SystemExit: asked to stop; a checkpoint was saved.
    """
    if job.plan:
        return print(describe(job)) if is_first_rank() else None
    build.check_output_dir(job)
    build.check_target(job)
    build.check_resumed(job)
    split = build.load_split(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with (
        process_group(device, job.parallelism) as dims,
        closing(Heartbeat(partial(print, flush=True))) as heartbeat,
        report_lost_ranks(heartbeat),
    ):
        with (
            fast_float32_matmuls(device),
            build.tokenizing(job, split) as rows,
            closing(build.build_target(job, device)) as target,
        ):
            on_first_rank(rows.wait)
            data = build.build_data(job, target, split)
            target.expect(data.training.rows, data.held_out.rows)
            vocabulary = first_rank_first(partial(build.build_draft_vocabulary, job, target, data.training))
            build.announce(data, vocabulary)
            draft = build.build_draft(job, target, vocabulary)
            objective = build.build_objective(job, target, context_group(dims))
            run = build.prepare_run(job)
            trainer = build.build_trainer(
                job, target=target, draft=draft, objective=objective, data=data, run=run, dims=dims, device=device
            )
            heartbeat.get_progress = trainer.progress
            with closing(trainer):
                if job.resume is Resume.auto:
                    trainer.resume()
                build.save_config(job, run)
                save_questions(run, data.prompts[: job.evaluation.num_questions])
                trainer.train()
        measure_and_summarize(job, target, run, data.prompts)
    return None
