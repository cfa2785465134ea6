"""Train an EAGLE-1 draft: feature autoregression, drafted as a chain.

python recipes/train_eagle1.py                       the embedded case: no download, no GPU, minutes
python recipes/train_eagle1.py draft.ttt_steps=3 draft.topk_w=1     with aligned passes (HASS)
torchrun --nproc-per-node 8 recipes/train_eagle1.py model=llama31_8b data.path=conversations.jsonl
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import TrainJob


@recipe("train_eagle1")
def main(job: TrainJob) -> None:
    from nemo_speculative.training.run import train

    train(job)


if __name__ == "__main__":
    main()
