"""The directory of a range: its answers, its skipped and failed lines, and a manifest of what both depend on.

Answers belong to questions, not to line numbers: when the input changes between two runs, the stored records follow
their questions to the new numbers.
"""

import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from nemo_speculative.generate_data.prompt_file import PromptFile
from nemo_speculative.utils.append_log import AppendLog, read_lines, rewrite
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import differing_keys, read_manifest, write_manifest

ANSWERS, LEFT_OUT, SET_ASIDE = "answers.jsonl", "left_out.jsonl", "set_aside.jsonl"
MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when the records change their meaning."""
INPUT_KEYS = ("input", "input_lines", "range")
"""The manifest's keys about the questions; all others are about how they are answered, and must not change."""
RENUMBERING = "changing"
"""The manifest's input while the records get the numbers of a changed input."""
SKIPPED, FAILED = "skipped", "failed"
REMOVED = -1
"""The new number of a record whose question the input no longer has."""
PREFIX = re.compile(rb'\{"index": (\d+)(, "asked": "([0-9a-f]{16})", )')


@dataclass(frozen=True)
class Record:
    """One line of a directory's JSONL files."""

    index: int
    """The number of the input's line that it is about."""
    prompt_hash: int
    """See :func:`nemo_speculative.generate_data.prompt_file.prompt_hash`."""
    offset: int
    """Offset of the line in the file, in bytes."""
    line: bytes
    where: str
    """``file:number`` of the line, from 1."""

    def content(self) -> dict[str, Any]:
        """The parsed line.

        Raises:
            UserError: it is damaged.
        """
        try:
            return json.loads(self.line)
        except ValueError:
            raise self.damaged() from None

    def damaged(self) -> UserError:
        return _damaged(self.where, self.line)

    def renumbered(self, index: int) -> bytes:
        """The line with another number."""
        match = PREFIX.match(self.line)
        assert match is not None
        return b'{"index": %d' % index + self.line[match.start(2) :]


def make_record(index: int, prompt_hash: int, content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a :class:`Record`."""
    return {"index": index, "asked": f"{prompt_hash:016x}", **content}


def read_records(file: Path) -> Iterator[Record]:
    """The records that are complete now, one at a time, also while another process appends to the file.

    Raises:
        UserError: a line is not a record.
    """
    for line in read_lines(file):
        where = f"{file}:{line.number}"
        match = PREFIX.match(line.data)
        if match is None:
            raise _damaged(where, line.data)
        yield Record(int(match[1]), int(match[3], 16), line.offset, line.data, where)


def _damaged(where: str, line: bytes) -> UserError:
    return UserError(
        f"{where}: not a line that was written here ({line[:40]!r}); restore the file, or remove that line, "
        "and its question is answered again"
    )


def sort_records(file: Path, drop: Collection[int] = ()) -> None:
    """Sorts a file that no process writes by index, and replaces it in one step.

    Of several records with an index the last stays; of those in ``drop`` none.  One line at a time is in memory.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    indices, offsets = array("q"), array("q")
    for record in read_records(file):
        indices.append(record.index)
        offsets.append(record.offset)
    order = sorted(range(len(indices)), key=indices.__getitem__)
    latest = [n for n, after in zip_longest(order, order[1:]) if after is None or indices[after] != indices[n]]
    latest = [n for n in latest if indices[n] not in drop]
    if len(latest) < len(indices) or latest != sorted(latest):
        rewrite(file, _lines_at(file, [offsets[n] for n in latest]))


def _lines_at(file: Path, offsets: Iterable[int]) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            yield lines.readline()


def load_manifest(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: it is not a manifest of a :class:`ShardDir`, or has another format.
    """
    try:
        manifest = read_manifest(file) or {}
        manifest |= {key: manifest[key] for key in INPUT_KEYS}
    except (OSError, ValueError, KeyError):
        raise UserError(f"{file}: not a manifest that generate_data.py wrote; name a directory that it did") from None
    if (stored := manifest.get("format")) != FORMAT:
        raise UserError(
            f"{file}: found answers in format {stored or 'none'} of another version of this program, expected {FORMAT};"
            f" train on its {ANSWERS} as it is (data=jsonl data.path=FILE), or generate the answers in another output"
        )
    return manifest


def difference(stored: dict[str, Any], current: dict[str, Any], ignored: Collection[str] = ()) -> str | None:
    """The first key in which two manifests differ: ``temperature=0.0, and it is 0.7``."""
    for key in differing_keys(stored, current, ignored):
        name = "input (the content of path)" if key == "input" else key
        return f"{name}={stored.get(key)}, and it is {current.get(key)}"
    return None


class ShardDir:
    """The stored records of a range, new or resumed; a changed input renumbers them.

    Args:
        manifest: everything that the answers depend on.

    Raises:
        UserError: the directory was started with other settings, or is damaged.
    """

    def __init__(self, directory: Path, prompts: PromptFile, manifest: dict[str, Any]):
        self.directory, self.start, self._hashes = directory, prompts.start, prompts.prompt_hashes
        self._update_manifest(prompts, manifest)
        self._done = bytearray(len(prompts))
        self._attempts: dict[int, int] = {}
        for record in read_records(directory / ANSWERS):
            self._done[record.index - self.start] = True
        for record in read_records(directory / LEFT_OUT):
            content = record.content()
            self._attempts[record.index] = content["attempts"]
            if content["outcome"] == SKIPPED:
                self._done[record.index - self.start] = True
        self._answers, self._left_out = AppendLog(directory / ANSWERS), AppendLog(directory / LEFT_OUT)

    def _update_manifest(self, prompts: PromptFile, manifest: dict[str, Any]) -> None:
        file = self.directory / MANIFEST
        if not file.is_file():
            if (self.directory / ANSWERS).is_file():
                raise UserError(f"{self.directory}: there are answers and no {MANIFEST}; give another output")
            write_manifest(file, manifest)
            return
        stored = load_manifest(file)
        if differing := difference(stored, manifest, ignored=INPUT_KEYS):
            raise UserError(f"output: {self.directory} was started with {differing} now; give another output, or that")
        if stored["input"] != manifest["input"]:
            renumbering = Renumbering.plan(self.directory, prompts)
            write_manifest(file, stored | {"input": RENUMBERING})
            renumbering.apply()
            write_manifest(file, manifest)
            print(renumbering.describe(), flush=True)

    def is_pending(self, index: int) -> bool:
        """Whether a line has neither an answer nor a reason why it cannot have one."""
        return not self._done[index - self.start]

    @property
    def num_pending(self) -> int:
        return self._done.count(0)

    def add_answer(self, index: int, content: dict[str, Any]) -> None:
        """
        Raises:
            OSError: the disk is full.
        """
        self._answers.append(make_record(index, self._hashes[index - self.start], content))
        self._done[index - self.start] = True

    def add_left_out(
        self, index: int, item_id: str, outcome: str, reason: str, detail: str = "", attempts: int = 0
    ) -> None:
        """Records why a line has no answer; the attempts of a failed one add up over all runs.

        Raises:
            OSError: the disk is full.
        """
        attempts += self._attempts.get(index, 0)
        content: dict[str, Any] = {"id": item_id, "outcome": outcome, "reason": reason}
        content |= {"detail": detail} if detail else {}
        self._left_out.append(make_record(index, self._hashes[index - self.start], content | {"attempts": attempts}))

    def close(self) -> None:
        self._answers.close()
        self._left_out.close()


@dataclass(frozen=True)
class Renumbering:
    """The new number of each stored record after the input has changed, found by its question alone.

    An answer whose question the input no longer has moves from ``answers.jsonl`` to ``set_aside.jsonl``, and back if
    the question returns.  If a run ends in the middle, the next one completes it.
    """

    directory: Path
    answers: np.ndarray
    """int64, for each line of answers.jsonl its new number, or REMOVED."""
    set_aside: np.ndarray
    """int64, for each line of set_aside.jsonl its new number, or REMOVED."""
    left_out: np.ndarray
    """int64, for each line of left_out.jsonl its new number, or REMOVED."""

    @classmethod
    def plan(cls, directory: Path, prompts: PromptFile) -> "Renumbering":
        """
        Raises:
            UserError: none of the stored answers belongs to any of the questions.
        """
        for name in (ANSWERS, LEFT_OUT):
            sort_records(directory / name)
        answers, set_aside, left_out = (
            array("Q", (record.prompt_hash for record in read_records(directory / name)))
            for name in (ANSWERS, SET_ASIDE, LEFT_OUT)
        )
        # Those that are in answers.jsonl come first: of equal questions they keep theirs.
        numbers = _match(answers + set_aside, prompts)
        count = len(answers)
        if count and (numbers == REMOVED).all():
            raise UserError(
                f"output: {directory} holds answers to none of the lines of {prompts.file}; give another output, or "
                "the file that it was started with"
            )
        return cls(directory, numbers[:count], numbers[count:], _match(left_out, prompts))

    def apply(self) -> None:
        """
        Raises:
            OSError: the disk is full; nothing is lost.
        """
        self._set_aside()
        answers = chain(self._lines(ANSWERS, self.answers), self._lines(SET_ASIDE, self.set_aside))
        rewrite(self.directory / ANSWERS, answers)
        rewrite(self.directory / LEFT_OUT, self._lines(LEFT_OUT, self.left_out))

    def _set_aside(self) -> None:
        if not (self.answers == REMOVED).any():
            return
        stored = {record.prompt_hash for record in read_records(self.directory / SET_ASIDE)}
        log = AppendLog(self.directory / SET_ASIDE)
        for record, number in self._numbered(ANSWERS, self.answers):
            if number == REMOVED and record.prompt_hash not in stored:
                log.append_line(record.line)
        log.close()

    def _numbered(self, name: str, numbers: np.ndarray) -> Iterator[tuple[Record, int]]:
        # Records that were set aside just now follow the planned ones, and have no number.
        return zip(read_records(self.directory / name), numbers.tolist(), strict=False)

    def _lines(self, name: str, numbers: np.ndarray) -> Iterator[bytes]:
        return (record.renumbered(number) for record, number in self._numbered(name, numbers) if number != REMOVED)

    def describe(self) -> str:
        """One line on the changed input and its answers."""
        current, restored = (int((numbers != REMOVED).sum()) for numbers in (self.answers, self.set_aside))
        removed = len(self.answers) - current
        return (
            f"{self.directory}: the input changed: {current + restored} answers are to questions that it still has"
            + (f", {removed} to others ({SET_ASIDE})" if removed else "")
        )


def _match(stored: array, prompts: PromptFile) -> np.ndarray:
    """int64: for each stored hash the number of the line with that hash, or REMOVED.

    Of several equal hashes each gets a line of its own.
    """
    one, other = np.array(stored, np.uint64), np.array(prompts.prompt_hashes, np.uint64)
    order_one, order_other = (np.argsort(values, kind="stable") for values in (one, other))
    one, other = one[order_one], other[order_other]
    nth_of_equals = np.arange(len(one)) - np.searchsorted(one, one)
    at = np.searchsorted(other, one) + nth_of_equals
    clipped = np.minimum(at, len(other) - 1)
    numbers = np.full(len(one), REMOVED)
    matched = (at < len(other)) & (other[clipped] == one)
    numbers[order_one] = np.where(matched, order_other[clipped] + prompts.start, REMOVED)
    return numbers
