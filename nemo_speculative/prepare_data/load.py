"""A dataset of conf/data as a training reads it: prepared, by itself if need be."""

import json
from dataclasses import replace

from nemo_speculative.config.schema import DatasetConfig, MixDataConfig, PrepareJob
from nemo_speculative.data.sources import Split, load_jsonl
from nemo_speculative.distributed.collectives import is_first_rank
from nemo_speculative.prepare_data.output import finished, requested_values
from nemo_speculative.prepare_data.run import prepare
from nemo_speculative.prepare_data.sources import asked_for, sources_of
from nemo_speculative.prepare_data.table import table
from nemo_speculative.utils.errors import UserError


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
    else:
        _check_same(job)
    train, held_out = job.directory / "train.jsonl", job.directory / "held_out.jsonl"
    given = str(held_out) if held_out.stat().st_size else None
    return load_jsonl(replace(config, path=str(train), held_out_path=given), seed)


def _check_same(job: PrepareJob) -> None:
    """Not made anew here: it may have been prepared with other options than the defaults.

    Raises:
        UserError: what is prepared is of another dataset.
    """
    before = requested_values(job.directory)
    asked = asked_for(sources_of(job), job.data.held_out_share)
    for key, value in asked.items():
        if key not in before or before[key] != value:
            was = json.dumps(before[key]) if key in before else "no such key"
            raise UserError(
                f"{key}: {job.directory} was prepared with {was}, not {json.dumps(value)}; "
                "run recipes/prepare_data.py again, or name another data.prepared"
            )
    if is_first_rank() and (copies := [key for key in before if key.endswith(".path") and key not in asked]):
        print(f"data: {job.directory} was prepared from files ({', '.join(copies)}), not from the hub", flush=True)
