"""Train an EAGLE-3 draft for a target model, measure it, and leave a checkpoint that SGLang serves as it is.

python recipes/train_eagle3.py                       the embedded case: no download, no GPU, minutes
python recipes/train_eagle3.py plan=true             what would happen, without loading weights
torchrun --nproc-per-node 8 recipes/train_eagle3.py model=llama31_8b data.path=conversations.jsonl
"""

from contextlib import closing

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import Resume, TrainJob
from nemo_speculative.devices import choose_device
from nemo_speculative.training import assembly
from nemo_speculative.training.finish import measure_and_summarize
from nemo_speculative.training.parallelism import fast_float32_matmuls, process_group
from nemo_speculative.training.plan import describe


@recipe("train_eagle3")
def main(job: TrainJob) -> None:
    if job.plan:
        return print(describe(job))
    assembly.check_target(job)
    split = assembly.load_split(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with process_group(device, job.parallelism) as dims:
        with fast_float32_matmuls(device):
            target = assembly.build_target(job, device)
            data = assembly.build_data(job, target, split)
            vocabulary = assembly.build_draft_vocabulary(job, target, data.training)
            assembly.announce(data, vocabulary)
            draft = assembly.build_draft(job, target, vocabulary)
            objective = assembly.build_objective(job, target)
            run = assembly.prepare_run(job)
            trainer = assembly.build_trainer(
                job, target=target, draft=draft, objective=objective, data=data, run=run, dims=dims, device=device
            )
            with closing(trainer):
                if job.resume is Resume.auto:
                    trainer.resume()
                assembly.save_config(job, run)
                trainer.train()
        measure_and_summarize(job, target, run, data.prompts)
    return None


if __name__ == "__main__":
    main()
