"""Prepare a dataset, or a mix of several: one validated JSONL, without duplicates, split into training and held out.

python recipes/prepare_data.py data=sharegpt                        from the hub, to cache/dataset/sharegpt
python recipes/prepare_data.py data=sharegpt data.path=FILE         the same from a local copy
python recipes/prepare_data.py data=jsonl data.path=FOLDER          your own, in any known shape
python recipes/prepare_data.py data=mix "data.sources=[{name: sharegpt, weight: 2}, {name: FILE}]"

The same command resumes an interrupted run.  left_out.jsonl has the reason for each row that was left out.
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import PrepareJob


@recipe("prepare_data")
def main(job: PrepareJob) -> None:
    from nemo_speculative.prepare_data.output import table
    from nemo_speculative.prepare_data.run import prepare

    prepared = prepare(job)
    print(table(prepared.counts))
    print(f"{prepared.directory}: {'up to date' if prepared.up_to_date else 'written'}")


if __name__ == "__main__":
    main()
