"""Merge the parts that recipes/generate_data.py wrote into one JSONL file, in the order of the input.

python recipes/merge_data.py 'parts=[outputs/a,outputs/b]' output=answers.jsonl
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import MergeJob


@recipe("merge_data")
def main(job: MergeJob) -> None:
    from nemo_speculative.generate_data.merge import merge

    print(f"{job.output}: {merge(job)}")


if __name__ == "__main__":
    main()
