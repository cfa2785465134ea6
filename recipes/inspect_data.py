"""Show conversations as a training reads them: masks, lengths, truncation, packing, vocabulary, duplicates.

python recipes/inspect_data.py model=local model.path=DIR data.path=FILE data.max_length=4096
python recipes/inspect_data.py data=jsonl data.path=FILE "show=[ID,17]"     single conversations, their mask in color
python recipes/inspect_data.py data=jsonl data.path=FILE url=http://HOST:PORT  compared with an SGLang server
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import InspectJob


@recipe("inspect_data")
def main(job: InspectJob) -> None:
    from nemo_speculative.inspect_data.run import inspect

    print(inspect(job))
    print(f"report: {job.directory / 'report.html'}")


if __name__ == "__main__":
    main()
