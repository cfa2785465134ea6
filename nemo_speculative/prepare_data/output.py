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

from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.files import file_sizes, read_manifest, write_manifest
from nemo_speculative.utils.tables import markdown_table

TRAIN, HELD_OUT, LEFT_OUT = "train", "held_out", "left_out"
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

    def __add__(self, other: "Counts") -> "Counts":
        left_out = Counter(self.left_out) + Counter(other.left_out)
        return Counts(self.read + other.read, self.train + other.train, self.held_out + other.held_out, left_out)

    @property
    def kept(self) -> int:
        return self.train + self.held_out

    @property
    def reasons(self) -> list[str]:
        """``12 duplicate``: how many were left out for each reason, the most frequent first."""
        return [f"{number} {reason}" for reason, number in Counter(self.left_out).most_common()]


class Output:
    """The directory of a preparation while it is written; resumes an interrupted run of the same ``fingerprint``."""

    def __init__(self, directory: Path, fingerprint: str, labels: list[str]):
        self.directory, self.fingerprint = directory, fingerprint
        self.counts = {label: Counts() for label in labels}
        sizes = dict.fromkeys((TRAIN, HELD_OUT, LEFT_OUT), 0)
        self._partial = {name: directory / f".{name}.partial" for name in sizes}
        state = read_manifest(directory / STATE) or {}
        if state.get("fingerprint") == fingerprint and all(file.is_file() for file in self._partial.values()):
            self.counts, sizes = read_counts(state), state["bytes"]
        self.rows_before = sum(counts.read for counts in self.counts.values())
        """Rows that an interrupted run read."""
        self._logs = {name: AppendLog(file, size=sizes[name]) for name, file in self._partial.items()}
        self._rows_since_state = 0

    def close(self) -> None:
        for log in self._logs.values():
            with contextlib.suppress(OSError):  # what is not on disk comes after the last state, and is read again
                log.close()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows kept so far."""
        for name in (TRAIN, HELD_OUT):
            with self._partial[name].open("rb") as lines:
                yield from map(json.loads, lines)

    def write(self, label: str, name: str, row: dict[str, Any]) -> None:
        """Appends a row of the stream ``label`` to the file ``name``, and counts it."""
        self._logs[name].append_line((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace"))
        counts = self.counts[label]
        counts.read += 1
        if name == LEFT_OUT:
            counts.left_out[row["reason"]] = counts.left_out.get(row["reason"], 0) + 1
        else:
            setattr(counts, name, getattr(counts, name) + 1)
        self._rows_since_state += 1
        if self._rows_since_state == ROWS_BETWEEN_STATES:
            self._save(STATE, {})

    def finish(self, description: Mapping[str, Any]) -> None:
        """Gives the files their names, and writes the manifest with ``description``."""
        self._save(STATE, {})
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for name, file in self._partial.items():
            file.replace(self.directory / f"{name}.jsonl")
        self._save(MANIFEST, description)
        (self.directory / STATE).unlink()

    def _save(self, name: str, description: Mapping[str, Any]) -> None:
        self._rows_since_state = 0
        values = {"fingerprint": self.fingerprint, "bytes": {name: log.size for name, log in self._logs.items()}}
        counts = {label: asdict(counts) for label, counts in self.counts.items()}
        write_manifest(self.directory / name, {**values, **description, "counts": counts})


def read_complete(directory: Path) -> dict[str, Any] | None:
    """The manifest of the preparation in ``directory``; None if there is no complete one."""
    manifest = read_manifest(directory / MANIFEST)
    if not manifest:
        return None
    sizes = {f"{name}.jsonl": size for name, size in manifest["bytes"].items()}
    return manifest if file_sizes(directory, sizes) == sizes else None


def read_counts(manifest: Mapping[str, Any]) -> dict[str, Counts]:
    """The counts of each stream that a manifest or state holds."""
    return {label: Counts(**counts) for label, counts in manifest["counts"].items()}


def table(counts: Mapping[str, Counts]) -> str:
    """A Markdown table with a line for each source and reason."""
    sums = {"all": sum(counts.values(), Counts())} if len(counts) > 1 else {}
    rows: list[list[str]] = []
    for name, each in [*counts.items(), *sums.items()]:
        first, *others = each.reasons or [""]
        numbers = (each.read, each.train, each.held_out, sum(each.left_out.values()))
        rows.append([name, *map(str, numbers), first])
        rows += (["", "", "", "", "", reason] for reason in others)
    return markdown_table(("source", "rows", "train", "held out", "left out", "why"), rows)
