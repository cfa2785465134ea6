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
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from nemo_speculative.utils.errors import UserError, describe_error

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
BATCH_ROWS = 256
CHUNK_CHARACTERS = 1 << 20
CUT_CHARACTERS = 16
"""A literal, number or escape that the end of a chunk cuts starts at most this far before it."""
SEPARATORS = re.compile(r"[\s,]*")
"""Between the elements of a JSON array."""

NOT_JSON, NOT_UTF8, NOT_AN_OBJECT, UNKNOWN_SHAPE = "not JSON", "not UTF-8", "not a JSON object", "unknown shape"
UNREADABLE = {NOT_JSON, NOT_UTF8, NOT_AN_OBJECT, UNKNOWN_SHAPE}
"""A file most of whose rows have one of these reasons is not the data that the user meant."""


class LeftOut(Exception):
    """A row cannot be used: the reason, as the table and left_out.jsonl state it, and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason, found)
        self.reason, self.found = reason, found


@dataclass(frozen=True)
class Row:
    """A record, or why it cannot be used."""

    origin: str
    """``file:line``, ``file[element]`` or ``table:row``."""
    record: dict[str, Any] | LeftOut
    size: int
    """Approximate bytes in the file."""
    id: str | None = None
    """The row's own id; None: it has none, or the record is as it is stored."""


@dataclass(frozen=True)
class Part:
    """A file or table."""

    name: str
    files: list[Path]
    rows: Callable[[], Iterator[Row]]
    """The rows in order; raises UserError if the file cannot be read, or not any further."""

    def sha256(self) -> str:
        """SHA-256 over the contents of its files, regardless of their names."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def local_parts(path: str, key: str, split: str | None) -> list[Part]:
    """The data at ``path``: a file, a folder of files, or a dataset that `datasets` saved.

    ``split`` is that of a saved dataset; None: all splits.  Raises UserError, which names the configuration ``key`` of
    the path, if there is nothing that can be read.
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
    """A split of a repository on the hub; raises UserError if it cannot be downloaded."""
    import datasets  # slow to import, and needed here only

    try:
        table = datasets.load_dataset(repository, subset, split=split, revision=revision)
    except Exception as error:  # one class for each way in which a hub can fail
        raise UserError(
            f"data.repository: {repository} cannot be loaded here ({describe_error(error, 100)}); download it "
            "elsewhere and give data.path=FILE_OR_FOLDER"
        ) from None
    return [_table(f"{repository}:{split}", table)]


def _file(path: Path) -> Part:
    with path.open("rb") as stream:
        read = _parquet_rows if stream.read(4) == b"PAR1" else _json_rows
    return Part(str(path), [path], partial(read, path))


def _saved(root: Path, key: str, split: str | None) -> list[Part]:
    import datasets  # slow to import, and needed here only

    try:
        saved = datasets.load_from_disk(str(root))
    except Exception as error:  # any part of it may be broken
        raise UserError(
            f"{key}: {root}: what `datasets` saved there cannot be read ({describe_error(error, 100)})"
        ) from None
    if isinstance(saved, datasets.Dataset):
        return [_table(str(root), saved)]
    if split is not None and split not in saved:
        raise UserError(f"{key}: {root} has the splits {', '.join(saved)}, not {split!r}; set data.split")
    return [_table(f"{root}:{name}", saved[name]) for name in ([split] if split else saved)]


def _table(name: str, table: Any) -> Part:
    """A memory-mapped table of the `datasets` library."""
    files = [Path(file["filename"]) for file in table.cache_files]
    size = sum(file.stat().st_size for file in files) // max(len(table), 1)

    def rows() -> Iterator[Row]:
        return _numbered(name, table.with_format("arrow").iter(BATCH_ROWS), size)

    return Part(name, files, rows)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            size = path.stat().st_size // max(file.metadata.num_rows, 1)
            yield from _numbered(str(path), file.iter_batches(BATCH_ROWS), size)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({describe_error(error, 100)}); download it again"
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


def _json_rows(path: Path) -> Iterator[Row]:
    """One object a line, or an array of objects; gzipped or not.  The first bytes tell which."""
    with path.open("rb") as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=file)) if zipped else file  # type: ignore[arg-type]
        read = 0
        try:
            start = stream.peek(CHUNK_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            for origin, record in _elements(path, stream) if start == b"[" else _lines(path, stream):
                if not isinstance(record, dict | LeftOut):
                    record = LeftOut(NOT_AN_OBJECT, f"a {type(record).__name__}")
                before, read = read, file.tell()
                yield Row(origin, record, read - before)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: cannot be unzipped ({describe_error(error, 100)}); download it again") from None


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        record: Any
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            record = LeftOut(NOT_UTF8, f"{error.reason} at byte {error.start}")
        except json.JSONDecodeError as error:
            record = LeftOut(NOT_JSON, f"{error.msg} at column {error.colno}")
        except RecursionError:
            record = LeftOut(NOT_JSON, "nested too deeply")
        yield f"{path}:{number}", record


def _elements(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The elements of an array, which cannot be read past an error in it, unlike lines.

    Memory holds one chunk, and an element that is longer.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")  # type: ignore[arg-type]
    decoder, number, buffer = json.JSONDecoder(), 0, ""
    try:
        while not buffer.endswith("["):
            buffer += text.read(1)
        at, lines_before = len(buffer), 0
        while True:
            at = SEPARATORS.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer.startswith("]", at):
                return
            try:
                element, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(buffer) - CUT_CHARACTERS
                # Longer chunks each time: the end of a long element is found after few attempts.
                more = text.read(max(CHUNK_CHARACTERS, len(buffer) - at)) if cut else ""
                if not more:
                    raise UserError(
                        f"{path}: not JSON at line {lines_before + error.lineno} ({error.msg}, element {number}); "
                        "an array cannot be read past that: correct it, or write one object a line"
                    ) from None
                lines_before += buffer.count("\n", 0, at)
                buffer, at = buffer[at:] + more, 0
                continue
            yield f"{path}[{number}]", element
            at, number = end, number + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}, after element {number}); convert it") from None
    except RecursionError:
        raise UserError(f"{path}: element {number} is nested too deeply; take it out") from None
