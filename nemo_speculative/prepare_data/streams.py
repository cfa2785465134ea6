"""The sources of a preparation, and their rows as streams: of one dataset, or of a mix interleaved by weight."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.config.schema import DataConfig, DatasetConfig, MixDataConfig, PrepareJob, SourceConfig
from nemo_speculative.prepare_data.output import HELD_OUT, TRAIN
from nemo_speculative.prepare_data.readers import Part, Row, hub_parts, local_parts
from nemo_speculative.prepare_data.reasons import UNKNOWN_SHAPE, UNREADABLE, LeftOut
from nemo_speculative.prepare_data.shapes import Item, known_shapes, recognize
from nemo_speculative.utils.errors import UserError

HUB_KEYS = ("repository", "subset", "revision", "split", "held_out_split")
SINGLE_SOURCE = "data"
"""Configuration key of a source that is not part of a mix."""
SAMPLE_ROWS = 100
"""Rows of a file that decide whether it has a known shape."""
ID_KEYS = ("id", "uuid", "conversation_id", "prompt_id")
HELD_OUT_FIRST = math.inf
"""Weight of a held-out split: it is read first, so that its rows are duplicates in the training split."""


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
        """The files or tables of the source.

        Raises:
            UserError: they cannot be loaded.
        """
        data = self.data
        if data.path:
            return local_parts(data.path, "data.path", data.split if isinstance(data, DatasetConfig) else None)
        if isinstance(data, DatasetConfig):
            return hub_parts(data.repository, data.split, data.subset, data.revision)
        raise UserError("data: nothing to prepare here; give a file or folder, or a dataset of conf/data")

    def held_out_parts(self) -> list[Part]:
        """The files or tables of its held-out split, if it names one.

        Raises:
            UserError: they cannot be loaded.
        """
        data = self.data
        if data.held_out_path:
            return local_parts(data.held_out_path, "data.held_out_path", None)
        if isinstance(data, DatasetConfig) and data.held_out_split and not data.path:
            return hub_parts(data.repository, data.held_out_split, data.subset, data.revision)
        return []

    def requested_values(self) -> dict[str, Any]:
        """The source's configuration by key; see :func:`requested_values`."""
        values: dict[str, Any] = {"weight": self.weight}
        if isinstance(self.data, DatasetConfig):
            values |= {key: getattr(self.data, key) for key in HUB_KEYS}
        values["held_out_path"] = _content_hash(self.held_out_parts()) if self.data.held_out_path else None
        # Without a path, both the hub and a copy of it may have been prepared.
        return values | ({"path": _content_hash(self.parts())} if self.data.path else {})

    def streams(self, columns: dict[str, str]) -> list["Stream"]:
        """The streams of the held-out split, if there is one, and of the other rows."""
        name, held_out, from_hub = self.name, self.held_out_parts(), not self.data.path
        side = TRAIN if held_out else None
        streams = [Stream(name, name, self.parts(), self.weight, side, columns, from_hub)]
        if held_out:
            label, from_hub = f"{name}, held out", not self.data.held_out_path
            streams.insert(0, Stream(label, name, held_out, HELD_OUT_FIRST, HELD_OUT, columns, from_hub))
        return streams


def sources_of(job: PrepareJob) -> list[Source]:
    """The sources of a job.

    Raises:
        UserError: two have the same name, or a mix has a path, which it would not read.
    """
    if not isinstance(job.data, MixDataConfig):
        return [Source(SINGLE_SOURCE, _source_name(job.data), job.data)]
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


def requested_values(sources: Sequence[Source], held_out_share: float) -> dict[str, Any]:
    """The configuration that determines the rows, by key, with files by their content.  Does not access the hub.

    Raises:
        UserError: a file does not exist.
    """
    values: dict[str, Any] = {"data.held_out_share": held_out_share}
    if any(source.key != SINGLE_SOURCE for source in sources):
        values["data.sources"] = [source.name for source in sources]
    for source in sources:
        values |= {f"{source.key}.{key}": value for key, value in source.requested_values().items()}
    return values


def _content_hash(parts: Sequence[Part]) -> str:
    return "sha256:" + hashlib.sha256("".join(part.sha256() for part in parts).encode()).hexdigest()


def _source_of_mix(source: SourceConfig) -> Source:
    options = {file.stem for file in (CONF / "data").glob("*.yaml")}
    data = _data_option(source.name) if source.name in options else DataConfig(path=source.name)
    if source.path:
        data.path = source.path
    name = source.name if source.path or source.name in options else _file_name(source.name)
    return Source(f"data.sources[{name}]", name, data, source.weight)


def _data_option(name: str) -> DataConfig:
    """The configuration of conf/data/<name>.yaml."""
    if GlobalHydra.instance().is_initialized():
        return to_job(compose("prepare_data", overrides=[f"data={name}"])).data
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_job(compose("prepare_data", overrides=[f"data={name}"])).data


def _source_name(data: DataConfig) -> str:
    """The option of conf/data that has the same repository, else the name of the repository or of the file."""
    if not isinstance(data, DatasetConfig):
        return _file_name(data.path or "")
    for option in sorted((CONF / "data").glob("*.yaml")):
        values: Any = OmegaConf.load(option)
        if values.get("repository") == data.repository:
            return option.stem
    return _file_name(data.repository)


def _file_name(path: str) -> str:
    name = Path(os.path.abspath(path)).name  # the name of a link itself, which resolve() would follow
    return name.partition(".")[0] or name


@dataclass(frozen=True)
class StreamRow:
    """A row in one of the forms of :data:`~.shapes.Item`, or why it is left out."""

    origin: str
    id: str | None
    """The row's own id; None: it has none."""
    item: Item | LeftOut
    size: int
    """Approximate bytes in its file, with those of the rows skipped before it."""


@dataclass(frozen=True)
class Stream:
    """The rows of one source, in the order of its files."""

    label: str
    """Name of the stream in the table."""
    source: str
    """``source`` of its rows."""
    parts: list[Part]
    weight: float = 1.0
    side: str | None = None
    """``train`` or ``held_out``; None: by the hash of a row's id."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename."""
    from_hub: bool = False

    def rows(self, skip: int) -> Iterator[StreamRow]:
        """Every row after the first ``skip``.

        Raises:
            UserError: a file cannot be read further, or most of its rows have no known shape.
        """
        position, skipped = 0, 0
        for part in self.parts:
            check = _ShapeCheck(part.name)
            for row in part.rows():
                position += 1
                if position <= skip:
                    skipped += row.size
                    continue
                result, skipped = self._read(row, row.size + skipped), 0
                check.count(result)
                yield result
            check.check()

    def _read(self, row: Row, size: int) -> StreamRow:
        if isinstance(row.record, LeftOut):
            return StreamRow(row.origin, None, row.record, size)
        record = {self.columns.get(key, key): value for key, value in row.record.items()}
        identity = next((str(record[key]) for key in ID_KEYS if record.get(key) not in (None, "")), None)
        if identity is not None:
            identity = identity.encode(errors="replace").decode()  # JSON can hold a lone surrogate, UTF-8 cannot
        try:
            return StreamRow(row.origin, identity, recognize(record), size)
        except LeftOut as left_out:
            return StreamRow(row.origin, identity, left_out, size)


class _ShapeCheck:
    """Counts the rows of a file that cannot be read, and refuses a file of which most cannot."""

    def __init__(self, name: str):
        self.name, self.rows = name, 0
        self.unreadable: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def count(self, row: StreamRow) -> None:
        self.rows += 1
        if isinstance(row.item, LeftOut) and row.item.reason in UNREADABLE:
            self.unreadable[row.item.reason] += 1
            self.examples.setdefault(row.item.reason, row.item.found)
        if self.rows == SAMPLE_ROWS:
            self.check()

    def check(self) -> None:
        """
        Raises:
            UserError: more than half of the rows cannot be read.
        """
        if 2 * self.unreadable.total() <= self.rows:
            return
        ((reason, _),) = self.unreadable.most_common(1)
        expected = "expected JSON in UTF-8, one object a line or an array of them, or Parquet"
        if reason == UNKNOWN_SHAPE:
            expected = f"known: {known_shapes()}; rename columns with columns={{THEIRS: KNOWN}}"
        raise UserError(
            f"{self.name}: {self.unreadable.total()} of the first {self.rows} rows cannot be read, most often: "
            f"{reason} ({self.examples[reason]}); {expected}"
        )


def interleave(
    streams: Sequence[Stream], num_read: Callable[[Stream], int], num_kept: Callable[[Stream], int]
) -> Iterator[tuple[Stream, StreamRow]]:
    """Rows of all streams, of each in its order; the next comes from the stream furthest below its weight.

    The shares of the rows kept are therefore those of the weights after every row, until a stream ends.

    Args:
        num_read: rows of a stream that an interrupted run read.
        num_kept: rows of a stream kept so far.
    """
    open_streams = {s.label: (s, s.rows(num_read(s))) for s in streams}
    while open_streams:
        stream, rows = min(open_streams.values(), key=lambda each: (num_kept(each[0]) + 1) / each[0].weight)
        row = next(rows, None)
        if row is None:
            del open_streams[stream.label]
        else:
            yield stream, row


def hub_hashes(streams: Sequence[Stream]) -> dict[str, list[str]]:
    """SHA-256 of what the hub gave for each stream, since the content of a branch changes."""
    return {s.label: [part.sha256() for part in s.parts] for s in streams if s.from_hub}
