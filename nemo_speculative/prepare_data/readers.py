"""Files, folders and tables as records, one in memory at a time.

A row that cannot be read is a :class:`LeftOut` in its place; a file that cannot be read further is an error.  The
``datasets`` library reads tables and the hub.  JSON is read here, because that library ends at the first bad line (it
returned none of 20,001 lines with one bad), reports no line numbers, and took 20 times as long (40 s against 2 s for
20,000 lines).
"""

import gzip
import hashlib
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.utils.errors import UserError, describe_error

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
BATCH_ROWS = 256
CHUNK_CHARACTERS = 1 << 20
CUT_CHARACTERS = 16
"""A JSON error this close to the end of the buffer may only mean that more must be read."""


@dataclass(frozen=True)
class Row:
    """A record as it is stored, or why it cannot be read."""

    origin: str
    """``file:line``, ``file[element]`` or ``table:row``."""
    record: dict[str, Any] | LeftOut
    size: int
    """Approximate bytes in the file."""


class Part(ABC):
    """A file or table."""

    name: str
    files: list[Path]

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows of the file or table, in order.

        Raises:
            UserError: it cannot be read, or not any further.
        """

    def sha256(self) -> str:
        """SHA-256 over the contents of its files, regardless of their names."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def local_parts(path: str, key: str, split: str | None) -> list[Part]:
    """The data at ``path``: a file, a folder of files, or a dataset that `datasets` saved.

    Args:
        key: configuration key of the path, for error messages.
        split: of a dataset that `datasets` saved; None: all splits.

    Raises:
        UserError: there is nothing that can be read.
    """
    root = Path(path)
    if root.is_file():
        return [_file(root)]
    if not root.is_dir():
        raise UserError(f"{key}: {root} does not exist; expected a file or folder of JSON, JSONL (.gz) or Parquet")
    if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
        return _saved(root, key, split)
    files = [f for f in sorted(root.rglob("*")) if f.name.endswith(SUFFIXES) and f.is_file()]
    visible = [f for f in files if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    if not visible:
        raise UserError(f"{key}: {root} holds none of {', '.join('*' + s for s in SUFFIXES)}; name another folder")
    return [_file(f) for f in visible]


def hub_parts(repository: str, split: str, subset: str | None, revision: str | None) -> list[Part]:
    """A split of a repository on the hub.

    Raises:
        UserError: it cannot be downloaded.
    """
    import datasets  # slow to import, and needed here only

    try:
        table = datasets.load_dataset(repository, subset, split=split, revision=revision)
    except Exception as error:  # one class for each way in which a hub can fail
        raise UserError(
            f"data.repository: {repository} cannot be loaded here ({describe_error(error, 100)}); download it "
            "elsewhere and give data.path=FILE_OR_FOLDER"
        ) from None
    return [Table(f"{repository}:{split}", table)]


def _file(path: Path) -> Part:
    with path.open("rb") as stream:
        return ParquetFile(path) if stream.read(4) == b"PAR1" else JsonFile(path)


def _saved(root: Path, key: str, split: str | None) -> list[Part]:
    import datasets  # slow to import, and needed here only

    try:
        saved = datasets.load_from_disk(str(root))
    except Exception as error:  # any part of it may be broken
        raise UserError(
            f"{key}: {root}: what `datasets` saved there cannot be read ({describe_error(error, 100)})"
        ) from None
    if isinstance(saved, datasets.Dataset):
        return [Table(str(root), saved)]
    if split is not None and split not in saved:
        raise UserError(f"{key}: {root} has the splits {', '.join(saved)}, not {split!r}; set data.split")
    return [Table(f"{root}:{name}", saved[name]) for name in ([split] if split else saved)]


@dataclass(frozen=True)
class Table(Part):
    """A memory-mapped table of the `datasets` library."""

    name: str
    table: Any

    @property
    def files(self) -> list[Path]:  # type: ignore[override]
        return [Path(file["filename"]) for file in self.table.cache_files]

    def rows(self) -> Iterator[Row]:
        size = sum(file.stat().st_size for file in self.files) // max(len(self.table), 1)
        yield from _numbered(self.name, self.table.with_format("arrow").iter(BATCH_ROWS), size)


class DataFile(Part):
    """A single file."""

    def __init__(self, path: Path):
        self.path, self.name, self.files = path, str(path), [path]


class ParquetFile(DataFile):
    """A Parquet file, read some rows at a time."""

    def rows(self) -> Iterator[Row]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path, pre_buffer=False) as file:
                size = self.path.stat().st_size // max(file.metadata.num_rows, 1)
                yield from _numbered(self.name, file.iter_batches(BATCH_ROWS), size)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: cannot be read as Parquet ({describe_error(error, 100)}); download it again"
            ) from None


def _numbered(name: str, batches: Iterable[Any], size: int) -> Iterator[Row]:
    """The rows of Arrow ``batches``, each of about ``size`` bytes on disk."""
    records = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(records):
        yield Row(f"{name}:{number}", _without_nulls(record), size)


def _without_nulls(value: Any) -> Any:
    """Removes the null values: Arrow gives every object the keys that any object of the column has."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


class JsonFile(DataFile):
    """One object a line, or an array of objects; gzipped or not.  Its first bytes tell which."""

    def rows(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if zipped else file  # type: ignore[arg-type]
            try:
                start = stream.peek(CHUNK_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
                yield from self._measured(self._elements(stream) if start == b"[" else self._lines(stream), file)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UserError(
                    f"{self.path}: cannot be unzipped ({describe_error(error, 100)}); download it again"
                ) from None

    @staticmethod
    def _measured(records: Iterator[tuple[str, Any]], file: BinaryIO) -> Iterator[Row]:
        """``records`` with the bytes of ``file`` that each took."""
        read = 0
        for origin, record in records:
            if not isinstance(record, dict | LeftOut):
                record = LeftOut(reasons.NOT_AN_OBJECT, f"a {type(record).__name__}")
            before, read = read, file.tell()
            yield Row(origin, record, read - before)

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{self.path}:{number}", _parsed(line)

    def _elements(self, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        """The elements of an array, which cannot be read past an error in it, unlike lines."""
        array = _Array(io.TextIOWrapper(stream, encoding="utf-8-sig"))  # type: ignore[arg-type]
        number = 0
        try:
            while (element := array.next()) is not _END:
                yield f"{self.path}[{number}]", element
                number += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 ({error.reason}, after element {number}); convert it") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}: not JSON at line {array.lines_before + error.lineno} ({error.msg}, element {number}); "
                "an array cannot be read past that: correct it, or write one object a line"
            ) from None
        except RecursionError:
            raise UserError(f"{self.path}: element {number} is nested too deeply; take it out") from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return LeftOut(reasons.NOT_UTF8, f"{error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return LeftOut(reasons.BAD_JSON, f"{error.msg} at column {error.colno}")
    except RecursionError:
        return LeftOut(reasons.BAD_JSON, "nested too deeply")


_END = object()


class _Array:
    """The elements of a JSON array, read in chunks; memory holds one element and one chunk."""

    def __init__(self, text: io.TextIOWrapper):
        self.text, self.buffer, self.at, self.lines_before = text, "", 0, 0
        self.decoder, self.opened = json.JSONDecoder(), False

    def next(self) -> Any:
        """The next element, or ``_END``.

        Raises:
            json.JSONDecodeError, UnicodeDecodeError, RecursionError
        """
        first, self.opened = not self.opened, True
        if first:
            self._take("[")
        if self._peek() == "]":
            return _END
        if not first:
            self._take(",")
            self._peek()
        while True:
            try:
                element, self.at = self.decoder.raw_decode(self.buffer, self.at)
                return element
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._read_more()):
                    raise

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - CUT_CHARACTERS

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at].isspace():
                self.at += 1
            if self.at < len(self.buffer) or not self._read_more():
                return self.buffer[self.at : self.at + 1]

    def _take(self, expected: str) -> None:
        if self._peek() != expected:
            raise json.JSONDecodeError(f"Expecting {expected!r}", self.buffer, self.at)
        self.at += 1

    def _read_more(self) -> bool:
        more = self.text.read(CHUNK_CHARACTERS)
        self.lines_before += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)
