"""Train an EAGLE-2 draft: the training of EAGLE-1, decoded and served as a dynamic tree.

python recipes/train_eagle2.py                       the embedded target: no download, no GPU, minutes
python recipes/train_eagle2.py exporter.topk=8 exporter.num_draft_tokens=32      a wider tree
python recipes/train_eagle2.py model=local model.path=DIR data.path=FILE      your own model and conversations
python recipes/train_eagle2.py … plan=true           what it would do and need, without loading weights
torchrun --nproc-per-node 8 recipes/train_eagle2.py experiment=llama31_8b_ultrachat draft=eagle2     a complete recipe
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import TrainJob


@recipe("train_eagle2")
def main(job: TrainJob) -> None:
    from nemo_speculative.training.run import train

    train(job)


if __name__ == "__main__":
    main()
