"""The sources of a preparation, and their rows as streams: of one dataset, or of a mix interleaved by weight."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nemo_speculative.config.app import to_job
from nemo_speculative.config.groups import CONF, options
from nemo_speculative.config.schema import DataConfig, DatasetConfig, MixDataConfig, PrepareJob, SourceConfig
from nemo_speculative.prepare_data.output import HELD_OUT, TRAIN, Counts
from nemo_speculative.prepare_data.readers import UNKNOWN_SHAPE, UNREADABLE, LeftOut, Part, Row, hub_parts, local_parts
from nemo_speculative.prepare_data.shapes import KNOWN_SHAPES, recognize
from nemo_speculative.utils.errors import UserError

HUB_KEYS = ("repository", "subset", "revision", "split", "held_out_split")
SAMPLE_ROWS = 100
"""Rows of a file that decide whether it has a known shape."""
ID_KEYS = ("id", "uuid", "conversation_id", "prompt_id")


@dataclass(frozen=True)
class Source:
    """A dataset, or one part of a mix, as it is configured; nothing of it is read yet."""

    key: str
    """Configuration key of the source."""
    name: str
    """Value of ``source`` in the rows."""
    data: DataConfig
    weight: float = 1.0

    def parts(self) -> list[Part]:
        """The files or tables of the source; raises UserError if they cannot be loaded."""
        data = self.data
        if data.path:
            return local_parts(data.path, "data.path", data.split if isinstance(data, DatasetConfig) else None)
        if isinstance(data, DatasetConfig):
            return hub_parts(data.repository, data.split, data.subset, data.revision)
        raise UserError("data: nothing to prepare here; give a file or folder, or a dataset of conf/data")

    def held_out_parts(self) -> list[Part]:
        """The files or tables of its held-out split, if it names one; raises UserError if they cannot be loaded."""
        data = self.data
        if data.held_out_path:
            return local_parts(data.held_out_path, "data.held_out_path", None)
        if isinstance(data, DatasetConfig) and data.held_out_split and not data.path:
            return hub_parts(data.repository, data.held_out_split, data.subset, data.revision)
        return []

    def streams(self) -> list["Stream"]:
        """The streams of the held-out split, if there is one, and of the other rows."""
        held_out = self.held_out_parts()
        rows = Stream(self.name, self.name, self.parts(), self.weight, TRAIN if held_out else None, not self.data.path)
        if not held_out:
            return [rows]
        # An infinite weight: it is read first, so that its rows are duplicates in the training split.
        label, from_hub = f"{self.name}, held out", not self.data.held_out_path
        return [Stream(label, self.name, held_out, math.inf, HELD_OUT, from_hub), rows]


def sources_of(job: PrepareJob) -> list[Source]:
    """The sources of a job; raises UserError if two have the same name, or if a mix has a path of its own."""
    if not isinstance(job.data, MixDataConfig):
        return [Source("data", _source_name(job.data), job.data)]
    for key in ("path", "held_out_path"):
        if file := getattr(job.data, key):
            raise UserError(
                f"data.{key} is {file}, and a mix reads data.sources only, of which it holds out data.held_out_share; "
                f"leave data.{key} out"
            )
    sources = [_source_of_mix(source) for source in job.data.sources]
    if len({source.name for source in sources}) < len(sources):
        raise UserError(f"data.sources: {', '.join(s.name for s in job.data.sources)}: give each a name of its own")
    return sources


def requested_values(job: PrepareJob, sources: Sequence[Source]) -> dict[str, Any]:
    """The configuration that determines the rows, by key, with files by their content.  Does not access the hub.

    Raises UserError if a file does not exist.
    """
    values: dict[str, Any] = {"data.held_out_share": job.data.held_out_share}
    if isinstance(job.data, MixDataConfig):
        values["data.sources"] = [source.name for source in sources]
    for source in sources:
        data = source.data
        own: dict[str, Any] = {"weight": source.weight}
        if isinstance(data, DatasetConfig):
            own |= {key: getattr(data, key) for key in HUB_KEYS}
        own["held_out_path"] = _content_hash(source.held_out_parts()) if data.held_out_path else None
        if data.path:  # without one, both the hub and a copy of it may have been prepared
            own["path"] = _content_hash(source.parts())
        values |= {f"{source.key}.{key}": value for key, value in own.items()}
    return values


def _content_hash(parts: Sequence[Part]) -> str:
    return "sha256:" + hashlib.sha256("".join(part.sha256() for part in parts).encode()).hexdigest()


def _source_of_mix(source: SourceConfig) -> Source:
    name, data = source.name, DataConfig(path=source.name)
    if name in options("data"):
        initialized = GlobalHydra.instance().is_initialized()
        with nullcontext() if initialized else initialize_config_dir(str(CONF), version_base="1.3"):
            data = to_job(compose("prepare_data", overrides=[f"data={name}"])).data
    elif not source.path:
        name = _file_name(name)
    if source.path:
        data.path = source.path
    return Source(f"data.sources[{name}]", name, data, source.weight)


def _source_name(data: DataConfig) -> str:
    """The option of conf/data that has the same repository, else the name of the repository or of the file."""
    if not isinstance(data, DatasetConfig):
        return _file_name(data.path or "")
    for option in options("data"):
        values: Any = OmegaConf.load(CONF / "data" / f"{option}.yaml")
        if values.get("repository") == data.repository:
            return option
    return _file_name(data.repository)


def _file_name(path: str) -> str:
    name = Path(os.path.abspath(path)).name  # the name of a link itself, which resolve() would follow
    return name.partition(".")[0] or name


@dataclass(frozen=True)
class Stream:
    """The rows of one source, in the order of its files."""

    label: str
    """Name of the stream in the table."""
    source: str
    """``source`` of its rows."""
    parts: list[Part]
    weight: float
    side: str | None
    """``train`` or ``held_out``; None: by the hash of a row's id."""
    from_hub: bool

    def rows(self, skip: int, columns: Mapping[str, str]) -> Iterator[Row]:
        """Every row after the first ``skip``, as a :data:`~.shapes.Item`, with ``columns`` renamed.

        Raises UserError if a file cannot be read further, or if most of its rows have no known shape.
        """
        position, skipped = 0, 0
        for part in self.parts:
            read, unreadable, examples = 0, Counter[str](), dict[str, str]()
            for row in part.rows():
                position += 1
                if position <= skip:
                    skipped += row.size  # counted with the next row
                    continue
                row, skipped = _converted(replace(row, size=row.size + skipped), columns), 0
                read += 1
                if isinstance(row.record, LeftOut) and row.record.reason in UNREADABLE:
                    unreadable[row.record.reason] += 1
                    examples.setdefault(row.record.reason, row.record.found)
                if read == SAMPLE_ROWS:
                    _require_readable(part.name, read, unreadable, examples)
                yield row
            _require_readable(part.name, read, unreadable, examples)


def _converted(row: Row, columns: Mapping[str, str]) -> Row:
    if isinstance(row.record, LeftOut):
        return row
    record = {columns.get(key, key): value for key, value in row.record.items()}
    identity = next((str(record[key]) for key in ID_KEYS if record.get(key) not in (None, "")), None)
    if identity is not None:
        identity = identity.encode(errors="replace").decode()  # JSON can hold a lone surrogate, UTF-8 cannot
    try:
        return replace(row, id=identity, record=recognize(record))
    except LeftOut as left_out:
        return replace(row, id=identity, record=left_out)


def _require_readable(name: str, rows: int, unreadable: Counter[str], examples: Mapping[str, str]) -> None:
    """Raises UserError if more than half of the rows of a file cannot be read."""
    if 2 * unreadable.total() <= rows:
        return
    ((reason, _),) = unreadable.most_common(1)
    expected = "expected JSON in UTF-8, one object a line or an array of them, or Parquet"
    if reason == UNKNOWN_SHAPE:
        expected = f"known: {KNOWN_SHAPES}; rename columns with columns={{THEIRS: KNOWN}}"
    raise UserError(
        f"{name}: {unreadable.total()} of the first {rows} rows cannot be read, most often: "
        f"{reason} ({examples[reason]}); {expected}"
    )


def interleave(
    streams: Sequence[Stream], counts: Mapping[str, Counts], columns: Mapping[str, str]
) -> Iterator[tuple[Stream, Row]]:
    """Rows of all streams, of each in its order; the next comes from the stream furthest below its weight.

    The shares of the rows kept are therefore those of the weights after every row, until a stream ends.  The caller
    updates ``counts``, by label the rows of a stream read and kept so far.
    """
    open_streams = {s.label: (s, s.rows(counts[s.label].read, columns)) for s in streams}
    while open_streams:
        stream, rows = min(open_streams.values(), key=lambda each: (counts[each[0].label].kept + 1) / each[0].weight)
        row = next(rows, None)
        if row is None:
            del open_streams[stream.label]
        else:
            yield stream, row
