"""The result of a preparation: rows, rows left out with their reasons, and a manifest.

Rows go to ``.<name>.partial``; at intervals ``state.json`` records the number of their valid bytes, and a later
run resumes from there.  At the end they get their names, and the manifest is written last: a directory that has one is
complete.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.files import disk_full_error, file_sizes, read_manifest, write_manifest

TRAIN, HELD_OUT, LEFT_OUT = "train", "held_out", "left_out"
FILES = (TRAIN, HELD_OUT, LEFT_OUT)
MANIFEST, STATE = "manifest.json", "state.json"
ROWS_BETWEEN_STATES = 1000


@dataclass
class Counts:
    """Numbers of rows of a stream that were read, kept and left out."""

    read: int = 0
    train: int = 0
    held_out: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of rows left out, by reason."""

    @property
    def kept(self) -> int:
        return self.train + self.held_out

    @property
    def reasons(self) -> list[str]:
        """``12 duplicate``: how many were left out for each reason, the most frequent first."""
        return [f"{number} {reason}" for reason, number in Counter(self.left_out).most_common()]


def total(counts: Mapping[str, Counts]) -> Counts:
    """The sum over all streams."""
    every = list(counts.values())
    return Counts(
        read=sum(each.read for each in every),
        train=sum(each.train for each in every),
        held_out=sum(each.held_out for each in every),
        left_out=sum((Counter(each.left_out) for each in every), Counter()),
    )


class Output:
    """The directory of a preparation while it is written; a context manager.

    Raises:
        UserError: the disk is full.  What was written stays, and a later run resumes from there.
    """

    def __init__(self, directory: Path, fingerprint: str, labels: list[str]):
        self.directory, self.fingerprint = directory, fingerprint
        self.counts = {label: Counts() for label in labels}
        self._rows_since_state = 0
        self._logs: dict[str, AppendLog] = {}

    def __enter__(self) -> "Output":
        sizes = dict.fromkeys(FILES, 0)
        state = read_manifest(self.directory / STATE) or {}
        partial_files_exist = all(self._partial(name).is_file() for name in FILES)
        if state.get("fingerprint") == self.fingerprint and partial_files_exist:
            sizes = state["bytes"]
            self.counts = {label: Counts(**counts) for label, counts in state["counts"].items()}
        self._logs = {name: AppendLog(self._partial(name), size=sizes[name]) for name in FILES}
        return self

    def __exit__(self, *_: object) -> None:
        for log in self._logs.values():
            with contextlib.suppress(OSError):  # what is not on disk comes after the last state, and is read again
                log.close()

    @property
    def rows_before(self) -> int:
        """Rows that an interrupted run read."""
        return sum(counts.read for counts in self.counts.values())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows kept so far."""
        for name in (TRAIN, HELD_OUT):
            with self._partial(name).open("rb") as lines:
                yield from map(json.loads, lines)

    def keep(self, label: str, side: str, row: dict[str, Any]) -> None:
        """Writes a row of the stream ``label`` to ``side``, train or held_out."""
        self._write(side, row)
        counts = self.counts[label]
        setattr(counts, side, getattr(counts, side) + 1)
        self._count_read(counts)

    def leave_out(self, label: str, identity: str, origin: str, left_out: LeftOut) -> None:
        """Records why a row of the stream ``label`` is left out."""
        row = {"id": identity, "source": label, "origin": origin, "reason": left_out.reason, "found": left_out.found}
        self._write(LEFT_OUT, row)
        counts = self.counts[label]
        counts.left_out[left_out.reason] = counts.left_out.get(left_out.reason, 0) + 1
        self._count_read(counts)

    def finish(self, **description: Any) -> None:
        """Gives the files their names, and writes the manifest with ``description``."""
        for label, counts in self.counts.items():
            assert counts.read == counts.kept + sum(counts.left_out.values()), f"{label}: {counts}"
        self._save_state()
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for name in FILES:
            self._partial(name).replace(self.directory / f"{name}.jsonl")
        self._save(MANIFEST, description)
        (self.directory / STATE).unlink()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self._disk_full_error():
            self._logs[name].append_line(line.encode(errors="replace"))

    def _count_read(self, counts: Counts) -> None:
        counts.read += 1
        self._rows_since_state += 1
        if self._rows_since_state == ROWS_BETWEEN_STATES:
            self._save_state()

    def _save_state(self) -> None:
        self._rows_since_state = 0
        self._save(STATE, {})

    def _save(self, name: str, description: dict[str, Any]) -> None:
        values = {"fingerprint": self.fingerprint, "bytes": {name: log.size for name, log in self._logs.items()}}
        counts = {label: asdict(counts) for label, counts in self.counts.items()}
        with self._disk_full_error():
            write_manifest(self.directory / name, values | description | {"counts": counts})

    def _disk_full_error(self) -> contextlib.AbstractContextManager[None]:
        return disk_full_error(
            f"output: {self.directory}: the disk is full; make room and run again: it resumes where it stopped"
        )

    def _partial(self, name: str) -> Path:
        return self.directory / f".{name}.partial"


def finished(directory: Path, fingerprint: str | None = None) -> dict[str, Counts] | None:
    """The counts of the complete preparation in ``directory``; None if there is none (with that ``fingerprint``)."""
    manifest = read_manifest(directory / MANIFEST)
    if not manifest or fingerprint not in (None, manifest["fingerprint"]):
        return None
    sizes = {f"{name}.jsonl": size for name, size in manifest["bytes"].items()}
    if file_sizes(directory, sizes) != sizes:
        return None
    return {label: Counts(**counts) for label, counts in manifest["counts"].items()}


def stored_request(directory: Path) -> dict[str, Any]:
    """The configuration that the complete preparation in ``directory`` was requested with, by key."""
    return (read_manifest(directory / MANIFEST) or {}).get("asked", {})


def determining_values(directory: Path) -> dict[str, Any]:
    """Every value that determined the rows of the preparation in ``directory``, by key; empty if there is none."""
    return by_key(read_manifest(directory / MANIFEST) or {}) if finished(directory) else {}


def by_key(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description given to :meth:`Output.finish` as one flat mapping with full keys."""
    values = {
        key: value for part in ("asked", "fetched", "options") for key, value in description.get(part, {}).items()
    }
    filters = values.pop("filters", {})
    return values | {f"filters.{key}": value for key, value in filters.items()}


def table(counts: Mapping[str, Counts]) -> str:
    """A Markdown table with a line for each source and reason."""
    head = ("source", "rows", "train", "held out", "left out", "why")
    rows = [
        head,
        tuple("---" for _ in head),
        *(row for name, each in counts.items() for row in _table_rows(name, each)),
    ]
    if len(counts) > 1:
        rows += _table_rows("all", total(counts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(f"| {' | '.join(t.ljust(w) for t, w in zip(row, widths, strict=True))} |" for row in rows)


def _table_rows(name: str, counts: Counts) -> list[tuple[str, ...]]:
    first, *others = counts.reasons or [""]
    numbers = (counts.read, counts.train, counts.held_out, sum(counts.left_out.values()))
    return [(name, *map(str, numbers), first), *(("", "", "", "", "", reason) for reason in others)]
