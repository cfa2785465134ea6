"""A dataset of conf/data as a training reads it: prepared, by itself if need be."""

from dataclasses import replace

from nemo_speculative.config.schema import DatasetConfig, MixDataConfig, PrepareJob
from nemo_speculative.data.sources import Split, load_jsonl
from nemo_speculative.errors import UserError
from nemo_speculative.preparation.output import finished, prepared_from
from nemo_speculative.preparation.run import prepare
from nemo_speculative.preparation.streams import described, streams_of
from nemo_speculative.preparation.table import table


def load_prepared(config: DatasetConfig | MixDataConfig, seed: int) -> Split:
    """The rows of ``config.prepared``; the first process of a job makes them if they are not there, with the defaults
    of recipes/prepare_data.py, while the others wait.

    Raises:
        UserError: the dataset cannot be had or read, or what is prepared is of another one.
    """
    job = PrepareJob(data=config)
    if finished(job.directory) is None:
        prepared = prepare(job, wait=True)
        if not prepared.up_to_date:
            print(f"{job.directory}: prepared\n{table(prepared.counts)}", flush=True)
    elif config.path and described(streams_of(job)) != prepared_from(job.directory):
        # Not made anew here: it may have been prepared with other options than the defaults.
        raise UserError(
            f"data.path: {config.path} is not what {job.directory} was prepared from; "
            "run recipes/prepare_data.py again, or name another data.prepared"
        )
    train, held_out = job.directory / "train.jsonl", job.directory / "held_out.jsonl"
    given = str(held_out) if held_out.stat().st_size else None
    return load_jsonl(replace(config, path=str(train), held_out_path=given), seed)
