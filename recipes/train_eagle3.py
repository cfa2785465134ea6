"""Train an EAGLE-3 draft for a target model, measure it, and write a checkpoint that SGLang serves directly.

python recipes/train_eagle3.py                       the embedded target: no download, no GPU, minutes
python recipes/train_eagle3.py draft=eagle3_1        with the norms of EAGLE-3.1
python recipes/train_eagle3.py model=local model.path=DIR data.path=FILE      your own model and conversations
python recipes/train_eagle3.py … plan=true           what it would do and need, without loading weights
torchrun --nproc-per-node 8 recipes/train_eagle3.py experiment=llama31_8b_ultrachat     a complete recipe
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import TrainJob


@recipe("train_eagle3")
def main(job: TrainJob) -> None:
    from nemo_speculative.training.run import train

    train(job)


if __name__ == "__main__":
    main()
