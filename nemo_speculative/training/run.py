"""What every training recipe does, from a job to a measured checkpoint."""

from contextlib import closing
from functools import partial

from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.devices import choose_device
from nemo_speculative.ranks import first_rank_first, first_rank_only, is_first
from nemo_speculative.training import assembly
from nemo_speculative.training.finish import measure_and_summarize, save_questions
from nemo_speculative.training.heartbeat import Heartbeat, lost_ranks_named
from nemo_speculative.training.parallelism import context, fast_float32_matmuls, process_group
from nemo_speculative.training.plan import describe


def train(job: TrainJob) -> None:
    """Trains the draft of ``job``, measures it and writes ``summary.json``; with ``plan=true`` says what it would do.

    Raises:
        UserError: bad input, a loss that is not finite, or another rank is gone.
        SystemExit: asked to stop; a checkpoint was saved.
    """
    if job.plan:
        return print(describe(job)) if is_first() else None
    assembly.check_output_dir(job)
    assembly.check_target(job)
    assembly.check_resumed(job)
    split = assembly.load_split(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with (
        process_group(device, job.parallelism) as dims,
        closing(Heartbeat(partial(print, flush=True))) as heartbeat,
        lost_ranks_named(heartbeat),
    ):
        with (
            fast_float32_matmuls(device),
            assembly.tokenizing(job, split) as rows,
            closing(assembly.build_target(job, device)) as target,
        ):
            first_rank_only(rows.wait)
            data = assembly.build_data(job, target, split)
            target.expect(data.training.rows, data.held_out.rows)
            vocabulary = first_rank_first(partial(assembly.build_draft_vocabulary, job, target, data.training))
            assembly.announce(data, vocabulary)
            draft = assembly.build_draft(job, target, vocabulary)
            objective = assembly.build_objective(job, target, context(dims))
            run = assembly.prepare_run(job)
            trainer = assembly.build_trainer(
                job, target=target, draft=draft, objective=objective, data=data, run=run, dims=dims, device=device
            )
            heartbeat.where = trainer.place
            with closing(trainer):
                if job.resume is Resume.auto:
                    trainer.resume()
                assembly.save_config(job, run)
                save_questions(run, data.prompts[: job.evaluation.num_questions])
                trainer.train()
        measure_and_summarize(job, target, run, data.prompts)
    return None
