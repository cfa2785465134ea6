"""A range of a file of questions, and its directory: answers, skipped and failed lines, and a manifest.

Answers belong to questions, not to line numbers: when the input changes between two runs, the stored records follow
their questions to the new numbers.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.conversations import Item, item_content, parse_json, parse_line
from nemo_speculative.utils.append_log import AppendLog, read_lines, rewrite
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import differing_keys, read_manifest, write_manifest
from nemo_speculative.utils.progress import Progress

ANSWERS, LEFT_OUT, SET_ASIDE = "answers.jsonl", "left_out.jsonl", "set_aside.jsonl"
MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when the records change their meaning."""
INPUT_KEYS = ("input", "input_lines", "range")
"""The manifest's keys about the questions; all others are about how they are answered, and must not change."""
RENUMBERING = "changing"
"""The manifest's input while the records get the numbers of a changed input."""
SKIPPED, FAILED = "skipped", "failed"
PREFIX = re.compile(rb'\{"index": (\d+)(, "asked": "([0-9a-f]{16})", )')


class PromptFile:
    """The lines ``start`` to ``end`` of a file, counted from 0 without blank ones.

    All are checked now: a long run must not end at an error known before it.

    Raises:
        UserError: there is no such file or range, or a line of it is malformed.
    """

    def __init__(self, job: GenerateJob):
        self.file, (self.start, end) = Path(job.path), job.bounds()
        if not self.file.is_file():
            raise UserError(f"path: {self.file} does not exist or is not a file; expected a JSONL file")
        with self.file.open("rb") as content:
            self.digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
        self.num_lines, self.prompt_hashes = 0, array("Q")
        progress = Progress(f"checking {self.file}", self.file.stat().st_size)
        for index, number, line in self._lines():
            self.num_lines = index + 1
            if self.start <= index and (end is None or index < end):
                self.prompt_hashes.append(prompt_hash(self._parse(line, number)))
            progress.advance(by=len(line))
        if not self.num_lines:
            raise UserError(f"path: {self.file} is empty; expected one JSON object a line")
        if self.start >= self.num_lines or (end or 0) > self.num_lines:
            raise UserError(
                f"range is {job.range}: {self.file} has {self.num_lines} lines; expected start:end within "
                f"0:{self.num_lines}"
            )
        self.end = self.num_lines if end is None else end
        self.name = f"{self.start}-{'end' if end is None else end}"
        """The range's directory; a range without an end keeps its name when the file grows."""

    def __len__(self) -> int:
        return self.end - self.start

    def items(self, condition: Callable[[int], bool]) -> Iterator[tuple[int, Item]]:
        """The line numbers that meet ``condition``, each with its item; one item at a time in memory."""
        for index, number, line in islice(self._lines(), self.start, self.end):
            if condition(index):
                yield index, self._parse(line, number)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """The lines that are not blank, each with its index among them and its number in the file, from 1."""
        with self.file.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            for index, (number, line) in enumerate(lines):
                yield index, number, line

    def _parse(self, line: bytes, number: int) -> Item:
        origin = f"{self.file}:{number}"
        if b'"rows"' in line:  # generated before: only its messages are questions
            record = parse_json(line, origin)
            if "conversations" in record:
                record.pop("rows", None)
                line = json.dumps(record).encode()
        items = parse_line(line, self.file, number)
        if len(items) != 1:
            raise UserError(f'{origin}: found {len(items)} "rows" and no "conversations"; expected one question a line')
        return items[0]


def prompt_hash(item: Item) -> int:
    """64 bits of a hash of the item's id, source and content."""
    return int.from_bytes(hashlib.sha256(json.dumps(item_content(item)).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Record:
    """One line of a directory's JSONL files, about line ``index`` of the input, which has this hash."""

    index: int
    prompt_hash: int
    offset: int
    """Offset of the record in its file, in bytes."""
    line: bytes
    where: str
    """``file:number`` of the record, from 1."""

    def content(self) -> dict[str, Any]:
        """The parsed line; raises UserError if it is damaged."""
        try:
            return json.loads(self.line)
        except ValueError:
            raise damage_error(self.where, self.line) from None

    def renumbered(self, index: int) -> bytes:
        """The line with another number."""
        return PREFIX.sub(b'{"index": %d\\2' % index, self.line, count=1)


def make_record(index: int, prompt_hash: int, content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a :class:`Record`."""
    return {"index": index, "asked": f"{prompt_hash:016x}", **content}


def damage_error(where: str, line: bytes) -> UserError:
    """The error for a line that is not a record."""
    return UserError(
        f"{where}: not a line that was written here ({line[:40]!r}); restore the file, or remove that line, "
        "and its question is answered again"
    )


def read_records(file: Path) -> Iterator[Record]:
    """The records that are complete now, also while another process appends; raises UserError for a damaged line."""
    for line in read_lines(file):
        where = f"{file}:{line.number}"
        match = PREFIX.match(line.data)
        if match is None:
            raise damage_error(where, line.data)
        yield Record(int(match[1]), int(match[3], 16), line.offset, line.data, where)


def sort_records(file: Path, drop: Sequence[int] = ()) -> None:
    """Sorts a file that no process writes by index, in one step, with one line at a time in memory.

    Of several records with an index the last stays; of those in ``drop`` none.
    """
    indices, offsets = array("q"), array("q")
    for record in read_records(file):
        indices.append(record.index)
        offsets.append(record.offset)
    latest, positions = np.unique(np.array(indices)[::-1], return_index=True)
    order = np.array(offsets)[::-1][positions][~np.isin(latest, drop)]
    if len(order) < len(offsets) or (np.diff(order) < 0).any():
        rewrite(file, lines_at(file, order))


def lines_at(file: Path, offsets: Iterable[int]) -> Iterator[bytes]:
    """The lines of ``file`` at ``offsets``, in that order."""
    with file.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            yield lines.readline()


def load_manifest(file: Path) -> dict[str, Any]:
    """The manifest of a :class:`ShardDir`; raises UserError if it is not one, or has another format."""
    try:
        manifest = read_manifest(file) or {}
    except (OSError, ValueError):
        manifest = {}
    if not manifest.keys() >= set(INPUT_KEYS):
        raise UserError(f"{file}: not a manifest that generate_data.py wrote; name a directory that it did")
    if (stored := manifest.get("format")) != FORMAT:
        raise UserError(
            f"{file}: found answers in format {stored or 'none'} of another version of this program, expected {FORMAT};"
            f" train on its {ANSWERS} as it is (data=jsonl data.path=FILE), or generate the answers in another output"
        )
    return manifest


def difference(stored: dict[str, Any], current: dict[str, Any], ignored: Collection[str]) -> str | None:
    """The first key in which two manifests differ: ``temperature=0.0, and it is 0.7``."""
    for key in differing_keys(stored, current, ignored):
        name = "input (the content of path)" if key == "input" else key
        return f"{name}={stored.get(key)}, and it is {current.get(key)}"
    return None


class ShardDir:
    """The stored records of a range, new or resumed; a changed input renumbers them.

    ``manifest`` is everything that the answers depend on.  Raises UserError if the directory was started with other
    settings or is damaged, and OSError, as all writing here, if the disk is full.
    """

    def __init__(self, directory: Path, prompts: PromptFile, manifest: dict[str, Any]):
        self._start, self._hashes = prompts.start, prompts.prompt_hashes
        _update_manifest(directory, prompts, manifest)
        self._done, self._attempts = bytearray(len(prompts)), dict[int, int]()
        for record in read_records(directory / ANSWERS):
            self._done[record.index - self._start] = True
        for record in read_records(directory / LEFT_OUT):
            content = record.content()
            self._attempts[record.index] = content["attempts"]
            if content["outcome"] == SKIPPED:
                self._done[record.index - self._start] = True
        self._answers, self._left_out = AppendLog(directory / ANSWERS), AppendLog(directory / LEFT_OUT)

    def is_pending(self, index: int) -> bool:
        """Whether a line has neither an answer nor a reason why it cannot have one."""
        return not self._done[index - self._start]

    @property
    def num_pending(self) -> int:
        return self._done.count(0)

    def add_answer(self, index: int, content: dict[str, Any]) -> None:
        self._answers.append(make_record(index, self._hashes[index - self._start], content))

    def add_left_out(
        self, index: int, item_id: str, outcome: str, reason: str, detail: str = "", attempts: int = 0
    ) -> None:
        """Stores why a line has no answer; the attempts of a failed one add up over all runs."""
        content: dict[str, Any] = {"id": item_id, "outcome": outcome, "reason": reason}
        content |= {"detail": detail} if detail else {}
        content["attempts"] = attempts + self._attempts.get(index, 0)
        self._left_out.append(make_record(index, self._hashes[index - self._start], content))

    def close(self) -> None:
        self._answers.close()
        self._left_out.close()


def _update_manifest(directory: Path, prompts: PromptFile, manifest: dict[str, Any]) -> None:
    """Writes the manifest if the directory is new or the input has changed; then the records are renumbered first."""
    file = directory / MANIFEST
    if not file.is_file():
        if (directory / ANSWERS).is_file():
            raise UserError(f"{directory}: there are answers and no {MANIFEST}; give another output")
        write_manifest(file, manifest)
        return
    stored = load_manifest(file)
    if differing := difference(stored, manifest, ignored=INPUT_KEYS):
        raise UserError(f"output: {directory} was started with {differing} now; give another output, or that")
    if stored["input"] == manifest["input"]:
        return
    numbers = _new_numbers(directory, prompts)
    write_manifest(file, stored | {"input": RENUMBERING})
    _renumber(directory, numbers)
    write_manifest(file, manifest)
    current = sum(number is not None for number in numbers[ANSWERS] + numbers[SET_ASIDE])
    removed = numbers[ANSWERS].count(None)
    line = f"{directory}: the input changed: {current} answers are to questions that it still has"
    print(line + (f", {removed} to others ({SET_ASIDE})" if removed else ""), flush=True)


def _new_numbers(directory: Path, prompts: PromptFile) -> dict[str, list[int | None]]:
    """For each file the new numbers of its records, by their questions alone; None if the input lacks the question."""
    for name in (ANSWERS, LEFT_OUT):
        sort_records(directory / name)
    answers, set_aside, left_out = (
        array("Q", (record.prompt_hash for record in read_records(directory / name)))
        for name in (ANSWERS, SET_ASIDE, LEFT_OUT)
    )
    # Those that are in answers.jsonl come first: of equal questions they keep theirs.
    numbers, count = _match(answers + set_aside, prompts), len(answers)
    if count and set(numbers) == {None}:
        raise UserError(
            f"output: {directory} holds answers to none of the lines of {prompts.file}; give another output, or "
            "the file that it was started with"
        )
    return {ANSWERS: numbers[:count], SET_ASIDE: numbers[count:], LEFT_OUT: _match(left_out, prompts)}


def _match(stored: array, prompts: PromptFile) -> list[int | None]:
    """The number of a line with each stored hash, or None; equal hashes get a line each, in order."""
    numbers: list[int | None] = [None] * len(stored)
    hashes, position = prompts.prompt_hashes, 0
    lines = np.argsort(hashes, kind="stable")
    for record in np.argsort(stored, kind="stable"):
        while position < len(lines) and hashes[lines[position]] < stored[record]:
            position += 1
        if position < len(lines) and hashes[lines[position]] == stored[record]:
            numbers[record] = prompts.start + int(lines[position])
            position += 1
    return numbers


def _renumber(directory: Path, numbers: dict[str, list[int | None]]) -> None:
    """Gives every record its new number; if a run ends in the middle, the next one completes it.

    An answer whose question the input no longer has moves from ``answers.jsonl`` to ``set_aside.jsonl``, and back if
    the question returns.
    """

    def lines(name: str) -> Iterator[bytes]:
        # Records that were set aside just now follow those with a number.
        for record, number in zip(read_records(directory / name), numbers[name], strict=False):
            if number is not None:
                yield record.renumbered(number)

    _set_aside(directory, numbers[ANSWERS])
    rewrite(directory / ANSWERS, chain(lines(ANSWERS), lines(SET_ASIDE)))
    rewrite(directory / LEFT_OUT, lines(LEFT_OUT))


def _set_aside(directory: Path, numbers: Sequence[int | None]) -> None:
    """Copies the answers without a number, one for each question."""
    if None not in numbers:
        return
    stored = {record.prompt_hash for record in read_records(directory / SET_ASIDE)}
    with closing(AppendLog(directory / SET_ASIDE)) as log:
        for record, number in zip(read_records(directory / ANSWERS), numbers, strict=True):
            if number is None and record.prompt_hash not in stored:
                log.append_line(record.line)
