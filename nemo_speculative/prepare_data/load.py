"""Loads a dataset of conf/data for a training, preparing it first if need be."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_speculative.config.schema import DatasetConfig, MixDataConfig, PrepareJob
from nemo_speculative.data.conversations import Split, load_jsonl
from nemo_speculative.prepare_data.output import read_complete, table
from nemo_speculative.prepare_data.run import prepare
from nemo_speculative.prepare_data.streams import requested_values, sources_of
from nemo_speculative.utils.errors import UserError


def load_prepared(config: DatasetConfig | MixDataConfig, seed: int) -> Split:
    """The rows in ``config.prepared``.

    If there are none, the first process of a job prepares them with the defaults of recipes/prepare_data.py, while the
    others wait.

    Raises:
        UserError: the dataset cannot be loaded, or the directory holds another one.
    """
    job = PrepareJob(data=config)
    if manifest := read_complete(job.directory):
        _require_same_data(job, manifest.get("asked", {}))
    else:
        prepared = prepare(job, wait=True)
        if not prepared.up_to_date:
            print(f"{job.directory}: prepared\n{table(prepared.counts)}", flush=True)
    train, held_out = job.directory / "train.jsonl", job.directory / "held_out.jsonl"
    held_out_path = str(held_out) if held_out.stat().st_size else None
    return load_jsonl(replace(config, path=str(train), held_out_path=held_out_path), seed)


def load_file_or_prepared(config: DatasetConfig, seed: int) -> Split:
    """The JSONL file ``config.path`` where it is given, else the dataset; raises UserError if it cannot be read."""
    return load_jsonl(config, seed) if config.path else load_prepared(config, seed)


def _require_same_data(job: PrepareJob, stored: Mapping[str, Any]) -> None:
    """Raises UserError if other data was prepared than ``job`` requests; the options may differ from the defaults."""
    requested = requested_values(job, sources_of(job))
    for key, value in requested.items():
        if key not in stored or stored[key] != value:
            before = json.dumps(stored[key]) if key in stored else "no such key"
            raise UserError(
                f"{key}: {job.directory} was prepared with {before}, not {json.dumps(value)}; "
                "run recipes/prepare_data.py again, or name another data.prepared"
            )
    copies = [key for key in stored if key.endswith(".path") and key not in requested]
    if copies and os.environ.get("RANK", "0") == "0":
        print(f"data: {job.directory} was prepared from files ({', '.join(copies)}), not from the hub", flush=True)
