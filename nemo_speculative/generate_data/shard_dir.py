"""A range's directory: the answers, what was left out and why, and what both depend on."""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_speculative.generate_data.append_log import AppendLog, entries, put_in_order
from nemo_speculative.generate_data.moves import ANSWERS, LEFT_OUT, Moves
from nemo_speculative.generate_data.prompt_file import PromptFile
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when the records change their meaning."""
INPUT_KEYS = ("input", "input_lines", "range")
"""What a manifest says of the questions; all else is how they are answered, and stays."""
IN_BETWEEN = "changing"
"""The input of a part while its lines take the numbers that a changed input gives them."""
SKIPPED, FAILED = "skipped", "failed"
SHOWN = 3


@dataclass
class Outcome:
    """What became of the lines of a range."""

    directory: Path
    asked: int
    answered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines that nobody can answer, by reason."""
    failed: Counter[str] = field(default_factory=Counter)
    """Lines whose answers are still wanted, by reason."""
    finishes: Counter[str] = field(default_factory=Counter)
    """Answers by how they ended, see :class:`nemo_speculative.generate_data.rollout.Rollout`."""
    inexact: int = 0
    """Conversations whose ids are not known."""
    namesakes: int = 0
    """Lines with the id of an earlier one."""
    shared_ids: list[str] = field(default_factory=list)
    """Some of these ids."""

    def check(self) -> None:
        """
        Raises:
            UserError: a line is missing, or there twice.
        """
        found = self.answered + self.skipped.total() + self.failed.total()
        if found != self.asked:
            raise UserError(
                f"{self.directory}: {self.answered} answered, {self.skipped.total()} skipped and "
                f"{self.failed.total()} failed are not the {self.asked} lines of the range; start the same command "
                "again"
            )


class Part:
    """What a range has so far; see :func:`opened`."""

    def __init__(self, directory: Path, questions: PromptFile):
        self.directory, self.start, self._asked = directory, questions.start, questions.asked
        self._done = bytearray(len(questions))
        self._skipped: set[int] = set()
        self._attempts: dict[int, int] = {}
        for entry in entries(directory / ANSWERS):
            self._done[entry.index - self.start] = True
        for entry in entries(directory / LEFT_OUT):
            left = entry.record()
            self._attempts[entry.index] = left["attempts"]
            if left["outcome"] == SKIPPED:
                self._done[entry.index - self.start] = True
        self._answers, self._left_out = AppendLog(directory / ANSWERS), AppendLog(directory / LEFT_OUT)

    def wants(self, index: int) -> bool:
        """Whether a line has neither an answer nor a reason why there is none."""
        return not self._done[index - self.start]

    @property
    def pending(self) -> int:
        return self._done.count(0)

    def answer(self, index: int, record: dict[str, Any]) -> None:
        """
        Raises:
            OSError: there is no room.
        """
        self._answers.append(index, self._asked[index - self.start], record)
        self._done[index - self.start] = True

    def leave_out(
        self, index: int, identity: str, outcome: str, reason: str, detail: str = "", attempts: int = 0
    ) -> None:
        """Records why a line has no answer; one that failed counts its attempts over all runs.

        Raises:
            OSError: there is no room.
        """
        attempts += self._attempts.get(index, 0)
        said = {"id": identity, "outcome": outcome, "reason": reason}
        said |= {"detail": detail} if detail else {}
        self._left_out.append(index, self._asked[index - self.start], said | {"attempts": attempts})

    def close(self) -> None:
        self._answers.close()
        self._left_out.close()


@contextmanager
def opened(directory: Path, questions: PromptFile, manifest: dict[str, Any]) -> Iterator[Part]:
    """The part of a range in ``directory``, new or gone on with; what it holds follows its questions.

    Raises:
        UserError: it was begun with other settings than those of ``manifest``, or is damaged.
    """
    _agree(directory / MANIFEST, manifest, questions)
    part = Part(directory, questions)
    try:
        yield part
    finally:
        part.close()


def _agree(file: Path, manifest: dict[str, Any], questions: PromptFile) -> None:
    if not file.is_file():
        if (file.parent / ANSWERS).is_file():
            raise UserError(f"{file.parent}: there are answers and no {MANIFEST}; give another output")
        _write(file, manifest)
        return
    before = read_manifest(file)
    if differing := difference(_settings(before), _settings(manifest)):
        raise UserError(f"output: {file.parent} was begun with {differing} now; give another output, or that")
    if before["input"] != manifest["input"]:
        moves = Moves.of(file.parent, questions)
        _write(file, before | {"input": IN_BETWEEN})
        moves.carry_out()
        _write(file, manifest)
        print(moves.describe(), flush=True)


def _write(file: Path, manifest: dict[str, Any]) -> None:
    atomic_write_text(file, json.dumps(manifest, indent=1) + "\n")


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in INPUT_KEYS}


def read_manifest(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: it is none, or of answers in another format.
    """
    try:
        manifest = json.loads(file.read_text())
        manifest = {**manifest, **{key: manifest[key] for key in INPUT_KEYS}}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a manifest that generate_data.py wrote; name a directory that it did") from None
    if (found := manifest.get("format")) != FORMAT:
        raise UserError(
            f"{file}: found answers in format {found or 'none'} of another version of this program, expected {FORMAT}; "
            f"train on its {ANSWERS} as it is (data=jsonl data.path=FILE), or answer anew into another output"
        )
    return manifest


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first key in which two manifests differ: ``temperature=0.0, and it is 0.7``."""
    for key in [*one, *other]:
        if one.get(key) != other.get(key):
            name = "input (the content of path)" if key == "input" else key
            return f"{name}={one.get(key)}, and it is {other.get(key)}"
    return None


def concluded(directory: Path, asked: int) -> Outcome:
    """Puts the files of a part that nobody writes into the order of the input, and counts what they hold.

    Raises:
        UserError: they do not hold every line.
        OSError: there is no room for the ordered copies.
    """
    outcome = Outcome(directory, asked)
    put_in_order(directory / ANSWERS)
    left_before = {entry.index for entry in entries(directory / LEFT_OUT)}
    answered_since: set[int] = set()
    names = array("q")
    for entry in entries(directory / ANSWERS):
        if entry.index in left_before:
            answered_since.add(entry.index)
        record = entry.record()
        names.append(hash(record["id"]))
        outcome.answered += 1
        outcome.finishes.update(record["finish"])
        outcome.inexact += "rows" not in record and "input_ids" not in record
    put_in_order(directory / LEFT_OUT, dropped=answered_since)
    for entry in entries(directory / LEFT_OUT):
        left = entry.record()
        names.append(hash(left["id"]))
        (outcome.skipped if left["outcome"] == SKIPPED else outcome.failed)[left["reason"]] += 1
    outcome.namesakes = len(names) - len(np.unique(names))
    outcome.shared_ids = _shared(directory, names) if outcome.namesakes else []
    outcome.check()
    return outcome


def _shared(directory: Path, names: array) -> list[str]:
    """Some of the ids that several lines have."""
    hashes, times = np.unique(names, return_counts=True)
    shared, found = set(hashes[times > 1].tolist()), dict[str, None]()
    for entry in (entry for name in (ANSWERS, LEFT_OUT) for entry in entries(directory / name)):
        identity = entry.record()["id"]
        if hash(identity) in shared:
            found[identity] = None
        if len(found) == SHOWN:
            break
    return list(found)
