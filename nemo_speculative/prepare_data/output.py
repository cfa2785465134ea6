"""What a preparation leaves: rows, those left out with their reasons, and a manifest; nothing half done under a name.

Rows go to ``.<name>.partial``; ``state.json`` says now and then how far they are good, and from there a later run goes
on.  At the end they get their names, and the manifest comes last: a directory that has one is whole.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.utils.files import atomic_write_text, room_or

TRAIN, HELD_OUT, LEFT_OUT = "train", "held_out", "left_out"
FILES = (TRAIN, HELD_OUT, LEFT_OUT)
ROWS_BETWEEN_STATES = 1000


@dataclass
class Counts:
    """What became of the rows of a stream."""

    read: int = 0
    train: int = 0
    held_out: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        return self.train + self.held_out

    @property
    def reasons(self) -> list[str]:
        """How many were left out, and why; the most first."""
        return [f"{number} {reason}" for reason, number in Counter(self.left_out).most_common()]


def total(counts: Mapping[str, Counts]) -> Counts:
    """Of all streams."""
    every = list(counts.values())
    return Counts(
        read=sum(each.read for each in every),
        train=sum(each.train for each in every),
        held_out=sum(each.held_out for each in every),
        left_out=sum((Counter(each.left_out) for each in every), Counter()),
    )


class Output:
    """The directory of a preparation while it is written; used in a ``with``.

    Raises:
        UserError: the disk is full.  What was written stays, and a later run goes on from there.
    """

    def __init__(self, directory: Path, fingerprint: str, labels: list[str]):
        self.directory, self.fingerprint = directory, fingerprint
        self.counts = {label: Counts() for label in labels}
        self._rows_since = 0
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "Output":
        sizes = self._resumable()
        for name in FILES:
            file = self._partial(name).open("r+b" if sizes else "wb")
            if sizes:
                file.truncate(sizes[name])
                file.seek(0, os.SEEK_END)
            self._files[name] = file
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what was not flushed lies behind the last state, and is read again
                file.close()

    @property
    def _full(self) -> str:
        return f"output: {self.directory}: the disk is full; make room and run again: it goes on where it stopped"

    @property
    def rows_before(self) -> int:
        """Rows that an interrupted run read."""
        return sum(counts.read for counts in self.counts.values())

    def kept(self) -> Iterator[dict[str, Any]]:
        """The rows that are there."""
        for name in (TRAIN, HELD_OUT):
            with self._partial(name).open("rb") as rows:
                yield from map(json.loads, rows)

    def keep(self, label: str, side: str, row: dict[str, Any]) -> None:
        self._write(side, row)
        counts = self.counts[label]
        setattr(counts, side, getattr(counts, side) + 1)
        self._read(counts)

    def leave_out(self, label: str, identity: str, origin: str, left_out: LeftOut) -> None:
        row = {"id": identity, "source": label, "origin": origin, "reason": left_out.reason, "found": left_out.found}
        self._write(LEFT_OUT, row)
        counts = self.counts[label]
        counts.left_out[left_out.reason] = counts.left_out.get(left_out.reason, 0) + 1
        self._read(counts)

    def finish(self, **described: Any) -> None:
        """Gives the files their names, and writes the manifest."""
        for label, counts in self.counts.items():
            assert counts.read == counts.taken + sum(counts.left_out.values()), f"{label}: {counts}"
        self._save_state()
        (self.directory / "manifest.json").unlink(missing_ok=True)
        for name in FILES:
            self._partial(name).replace(self.directory / f"{name}.jsonl")
        sizes = {name: (self.directory / f"{name}.jsonl").stat().st_size for name in FILES}
        manifest = {"fingerprint": self.fingerprint, "bytes": sizes, **described, "counts": self._counts_plain()}
        with room_or(self._full):
            atomic_write_text(self.directory / "manifest.json", _as_text(manifest))
        (self.directory / "state.json").unlink()

    def _read(self, counts: Counts) -> None:
        counts.read += 1
        self._rows_since += 1
        if self._rows_since == ROWS_BETWEEN_STATES:
            self._save_state()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with room_or(self._full):
            self._files[name].write(line.encode(errors="replace"))

    def _save_state(self) -> None:
        self._rows_since = 0
        with room_or(self._full):
            for file in self._files.values():
                file.flush()
            sizes = {name: file.tell() for name, file in self._files.items()}
            state = {"fingerprint": self.fingerprint, "bytes": sizes, "counts": self._counts_plain()}
            atomic_write_text(self.directory / "state.json", _as_text(state))

    def _resumable(self) -> dict[str, int]:
        """How far each file is good, if an interrupted run of the same job left them."""
        state = _json(self.directory / "state.json")
        if state.get("fingerprint") != self.fingerprint or not all(self._partial(name).is_file() for name in FILES):
            return {}
        self.counts = {label: Counts(**counts) for label, counts in state["counts"].items()}
        return state["bytes"]

    def _counts_plain(self) -> dict[str, Any]:
        return {label: asdict(counts) for label, counts in self.counts.items()}

    def _partial(self, name: str) -> Path:
        return self.directory / f".{name}.partial"


def finished(directory: Path, fingerprint: str | None = None) -> dict[str, Counts] | None:
    """The counts of a whole preparation in ``directory``, of that fingerprint if one is given; None: there is none."""
    manifest = _json(directory / "manifest.json")
    if not manifest or fingerprint not in (None, manifest["fingerprint"]):
        return None
    files = {name: directory / f"{name}.jsonl" for name in FILES}
    if any(not file.is_file() or file.stat().st_size != manifest["bytes"][name] for name, file in files.items()):
        return None
    return {label: Counts(**counts) for label, counts in manifest["counts"].items()}


def prepared_from(directory: Path) -> dict[str, Any]:
    """What the whole preparation in ``directory`` was asked for, by the keys of the configuration."""
    return _json(directory / "manifest.json").get("asked", {})


def decided_by(directory: Path) -> dict[str, Any]:
    """All that decided about the rows of the whole preparation in ``directory``, by its keys; empty: there is none."""
    return by_key(_json(directory / "manifest.json")) if finished(directory) else {}


def by_key(described: Mapping[str, Any]) -> dict[str, Any]:
    """What :meth:`Output.finish` is given, each value by its full key."""
    values = {key: value for part in ("asked", "fetched", "options") for key, value in described.get(part, {}).items()}
    filters = values.pop("filters", {})
    return values | {f"filters.{key}": value for key, value in filters.items()}


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _as_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
