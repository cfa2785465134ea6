"""Have the target answer every question of a data file again, and store the token ids that it generates.

python recipes/generate_data.py model=local model.path=DIR path=FILE output=DIR              in this process
python recipes/generate_data.py model=… path=FILE output=DIR engine=endpoint 'engine.urls=[http://HOST:PORT]'
python recipes/generate_data.py … range=0:17500                    a part; recipes/merge_data.py merges parts

The same command resumes an interrupted run: finished answers stay, failed ones are tried again.
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import GenerateJob


@recipe("generate_data")
def main(job: GenerateJob) -> None:
    from nemo_speculative.generate_data.run import generate_data, require_success, summary_table

    outcome = generate_data(job)
    print(summary_table(outcome))
    require_success(outcome)


if __name__ == "__main__":
    main()
