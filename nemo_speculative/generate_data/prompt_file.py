"""The file whose questions are answered: read line by line, and known by its content."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_speculative.config.schema import GenerateJob
from nemo_speculative.data.conversation import Conversation, TokenRow, parse_json, parse_line
from nemo_speculative.data.conversations import item_content
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

Item = Conversation | TokenRow


@dataclass(frozen=True)
class PromptFile:
    """The lines ``start`` to ``end`` of a file, counted from 0 without the blank ones."""

    file: Path
    digest: str
    """Of the whole file's content."""
    count: int
    """Lines of the whole file."""
    start: int
    end: int
    asked: array
    """64 bits for each of them: of the id, the source, and all that the line says."""
    open_ended: bool = False
    """They go on as far as the file does."""

    @classmethod
    def of(cls, job: GenerateJob) -> "PromptFile":
        """Those that a job asks, each of them checked now: nothing is to end a long run that was known before it.

        Raises:
            UserError: there is no such file or range, or a line of it is malformed.
        """
        file, (start, end) = Path(job.path), job.bounds()
        if not file.is_file():
            raise UserError(f"path: {file} does not exist or is not a file; expected a JSONL file")
        digest, count, asked = hashlib.sha256(), 0, array("Q")
        progress = Progress(f"checking {file}", file.stat().st_size)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    if start <= count and (end is None or count < end):
                        asked.append(asked_by(_item(line, file, number)))
                    count += 1
                progress.advance(by=len(line))
        if start >= count or (end or 0) > count:
            raise UserError(
                f"range is {job.range or 'null'}: {file} has {count} lines; expected start:end within 0:{count}"
                if count
                else f"path: {file} is empty; expected one JSON object a line"
            )
        stop = count if end is None else end
        return cls(file, digest.hexdigest()[:32], count, start, stop, asked, open_ended=end is None)

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def name(self) -> str:
        """Of the range as it was asked for: one without an end keeps its name when the file grows."""
        return f"{self.start}-{'end' if self.open_ended else self.end}"

    def items(self, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, Item]]:
        """Those of the lines that are ``wanted``, by their numbers; one at a time in memory."""
        index = -1
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                index += bool(line.strip())
                if index >= self.end:
                    return
                if line.strip() and index >= self.start and wanted(index):
                    yield index, _item(line, self.file, number)


def asked_by(item: Item) -> int:
    """64 bits that tell it from others: of its id, its source, and all that it says."""
    return int.from_bytes(hashlib.sha256(json.dumps(item_content(item)).encode()).digest()[:8], "big")


def _item(line: bytes, file: Path, number: int) -> Item:
    origin = f"{file}:{number}"
    if b'"rows"' in line:  # answered before: it is asked again what its messages ask
        record = parse_json(line, origin)
        if "conversations" in record:
            record.pop("rows", None)
            line = json.dumps(record).encode()
    items = parse_line(line, origin, str(number))
    if len(items) != 1:
        raise UserError(f'{origin}: found {len(items)} "rows" and no "conversations"; expected one question a line')
    return items[0]
