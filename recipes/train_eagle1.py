"""Train an EAGLE-1 draft: feature autoregression, drafted as a chain.

python recipes/train_eagle1.py                       the embedded target: no download, no GPU, minutes
python recipes/train_eagle1.py draft.ttt_steps=3 draft.topk_w=1     with aligned passes (HASS)
python recipes/train_eagle1.py model=local model.path=DIR data.path=FILE      your own model and conversations
python recipes/train_eagle1.py … plan=true           what it would do and need, without loading weights
torchrun --nproc-per-node 8 recipes/train_eagle1.py experiment=llama31_8b_ultrachat draft=eagle1     a complete recipe
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import TrainJob


@recipe("train_eagle1")
def main(job: TrainJob) -> None:
    from nemo_speculative.training.run import train

    train(job)


if __name__ == "__main__":
    main()
