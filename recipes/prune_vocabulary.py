"""Remove the rows of a trained draft's head that its data hardly uses, and print their coverage.

python recipes/prune_vocabulary.py checkpoint=outputs/local-eagle3 output=outputs/pruned vocab_size=8000 data.path=FILE
python recipes/prune_vocabulary.py checkpoint=RUN output=DIR vocab_size=99.5% data.path=FILE
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import PruneJob


@recipe("prune_vocabulary")
def main(job: PruneJob) -> None:
    from nemo_speculative.checkpoint.prune_vocab import prune_checkpoint

    print(prune_checkpoint(job))
    print(f"checkpoint: {job.output}/model")


if __name__ == "__main__":
    main()
