"""The file whose questions are answered: read line by line, and identified by its content."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.conversations import Conversation, TokenRow, item_content, parse_json, parse_line
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

Item = Conversation | TokenRow


@dataclass(frozen=True)
class PromptFile:
    """The lines ``start`` to ``end`` of a file, counted from 0 without blank ones."""

    file: Path
    digest: str
    """Digest of the whole file's content."""
    num_lines: int
    """Number of lines of the whole file."""
    start: int
    end: int
    prompt_hashes: array
    """The :func:`prompt_hash` of each line of the range."""
    open_ended: bool = False
    """Whether the range ends where the file ends."""

    @classmethod
    def open(cls, job: GenerateJob) -> "PromptFile":
        """The range of ``job``, with each line checked now: a long run must not end at an error known before it.

        Raises:
            UserError: there is no such file or range, or a line of it is malformed.
        """
        file, (start, end) = Path(job.path), job.bounds()
        if not file.is_file():
            raise UserError(f"path: {file} does not exist or is not a file; expected a JSONL file")
        digest, count, hashes = hashlib.sha256(), 0, array("Q")
        progress = Progress(f"checking {file}", file.stat().st_size)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    if start <= count and (end is None or count < end):
                        hashes.append(prompt_hash(_parse(line, file, number)))
                    count += 1
                progress.advance(by=len(line))
        if start >= count or (end or 0) > count:
            raise UserError(
                f"range is {job.range or 'null'}: {file} has {count} lines; expected start:end within 0:{count}"
                if count
                else f"path: {file} is empty; expected one JSON object a line"
            )
        stop = count if end is None else end
        return cls(file, digest.hexdigest()[:32], count, start, stop, hashes, open_ended=end is None)

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def name(self) -> str:
        """The range's directory name; a range without an end keeps its name when the file grows."""
        return f"{self.start}-{'end' if self.open_ended else self.end}"

    def items(self, condition: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, Item]]:
        """The line numbers that meet ``condition``, each with its item; one item at a time in memory."""
        index = -1
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                index += bool(line.strip())
                if index >= self.end:
                    return
                if line.strip() and index >= self.start and condition(index):
                    yield index, _parse(line, self.file, number)


def prompt_hash(item: Item) -> int:
    """64 bits of a hash of the item's id, source and content."""
    return int.from_bytes(hashlib.sha256(json.dumps(item_content(item)).encode()).digest()[:8], "big")


def _parse(line: bytes, file: Path, number: int) -> Item:
    origin = f"{file}:{number}"
    if b'"rows"' in line:  # generated before: only its messages are questions
        record = parse_json(line, origin)
        if "conversations" in record:
            record.pop("rows", None)
            line = json.dumps(record).encode()
    items = parse_line(line, origin, str(number))
    if len(items) != 1:
        raise UserError(f'{origin}: found {len(items)} "rows" and no "conversations"; expected one question a line')
    return items[0]
