"""Train an EAGLE-2 draft: the training of EAGLE-1, decoded and served as a dynamic tree.

python recipes/train_eagle2.py                       the embedded case: no download, no GPU, minutes
python recipes/train_eagle2.py exporter.topk=8 exporter.num_draft_tokens=32      a wider tree
torchrun --nproc-per-node 8 recipes/train_eagle2.py model=llama31_8b data.path=conversations.jsonl
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import TrainJob


@recipe("train_eagle2")
def main(job: TrainJob) -> None:
    from nemo_speculative.training.run import train

    train(job)


if __name__ == "__main__":
    main()
