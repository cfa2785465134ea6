"""Evaluate a draft checkpoint with the built-in lossless decoder, next to plain decoding and n-gram drafting.

python recipes/evaluate.py checkpoint=outputs/tiny-eagle3          on the held-out questions of its run
python recipes/evaluate.py checkpoint=RUN questions=FILE           on your own
"""

import json

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import EvaluateJob


@recipe("evaluate")
def main(job: EvaluateJob) -> None:
    from nemo_speculative.evaluation.acceptance import describe, evaluate_checkpoint

    evaluation = evaluate_checkpoint(job)
    print(describe(evaluation))
    print(json.dumps(evaluation.summary()))


if __name__ == "__main__":
    main()
