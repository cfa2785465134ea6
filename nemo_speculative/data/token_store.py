"""Tokenised rows on disk: made once by several processes, mapped into memory, found again by what they were made of."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.chat_template import tokenizer_digest
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.conversations import Items
from nemo_speculative.data.indexed import Indexed
from nemo_speculative.data.tokenized_dataset import TokenizedDataset, row_digest, to_documents
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import dir_lock
from nemo_speculative.utils.progress import Progress

VERSION = 1
"""Raised when the same items would give other rows."""
CHUNK = 512
"""Items tokenised at once, and rows read from the disk at once."""
ITEMS_FOR_WORKERS = 4096
"""From so many on, further processes are worth the seconds that they take to start."""
MOST_WORKERS = 8
LOOK_SECONDS = 0.2
"""So often it is asked whether the rest is still wanted."""
ROWS, COUNTS, META = "rows.arrow", "counts.safetensors", "meta.json"
SCHEMA = pa.schema(
    {"id": pa.string(), "source": pa.string(), "input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
)


@dataclass(frozen=True)
class Tokenizing:
    """How items become rows: the arguments of :func:`.tokenized_dataset.to_documents`."""

    tokenizer: Any
    stop_ids: Collection[int]
    max_length: int
    vocab_size: int

    def __call__(self, items: Sequence[Any]) -> TokenizedDataset:
        return to_documents(items, self.tokenizer, self.stop_ids, self.max_length, self.vocab_size)

    def key(self, items: Items) -> str:
        """Equal where the rows are."""
        made_by = [VERSION, tokenizer_digest(self.tokenizer), sorted(self.stop_ids), self.max_length, self.vocab_size]
        return hashlib.sha256(json.dumps([items.fingerprint, *made_by]).encode()).hexdigest()[:16]


class StoredRows(Indexed[TokenRow]):
    """The rows of an Arrow file, read when asked for."""

    def __init__(self, file: Path):
        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = range(self._reader.num_record_batches)
        self._ends = list(accumulate(self._reader.get_batch(number).num_rows for number in batches))
        self._batch = lru_cache(maxsize=64)(self._reader.get_batch)
        self._file = file

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> TokenRow:
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        identity, source, ids, mask = self._batch(number).columns
        values = ids[row].values.to_numpy().tolist(), mask[row].values.to_numpy(zero_copy_only=False).tolist()
        return TokenRow(identity[row].as_py(), *values, f"{self._file}:{index}", source[row].as_py())

    @property
    def lengths(self) -> "array[int]":
        """Tokens of each row."""
        found = array("i")
        for number in range(self._reader.num_record_batches):
            found.frombytes(self._reader.get_batch(number).column("input_ids").value_lengths().to_numpy().tobytes())
        return found


def stored_documents(
    items: Items, how: Tokenizing, config: DataConfig, title: str, go_on: Callable[[], None] = lambda: None
) -> TokenizedDataset:
    """``items`` as documents, in the order of the file that they were chosen from.

    Taken from the cache of ``config`` where they were made before, of the same content.

    Args:
        go_on: called now and then while they are made; what it raises ends that.

    Raises:
        UserError: an item cannot be tokenised, a process that did was killed, or there is no room for what it made.
    """
    items = items.in_order()
    directory = Path(config.cache_dir) / "tokens" / how.key(items)
    with dir_lock(directory, "data.cache_dir", wait=True):
        if not _is_whole(directory):
            _make(items, how, directory, config.workers, title, go_on)
    return _open(directory, how.vocab_size)


def _is_whole(directory: Path) -> bool:
    try:
        meta = json.loads((directory / META).read_text())
        return meta["bytes"] == _sizes(directory)
    except (OSError, ValueError, KeyError):
        return False


def _sizes(directory: Path) -> dict[str, int]:
    return {name: (directory / name).stat().st_size for name in (ROWS, COUNTS)}


def _open(directory: Path, vocab_size: int) -> TokenizedDataset:
    meta, rows = json.loads((directory / META).read_text()), StoredRows(directory / ROWS)
    left_out = meta["unsupervised"], meta["truncated"], meta["supervised_tokens_cut"]
    documents = TokenizedDataset(vocab_size, rows, *left_out, directory)
    stored = load_file(directory / COUNTS)["counts"]
    # What would otherwise be counted by reading every row.
    documents.lengths = rows.lengths
    documents.counts = dict(zip(meta["sources"], stored, strict=True))
    documents.fingerprint = meta["fingerprint"]
    return documents


def _make(
    items: Items, how: Tokenizing, directory: Path, workers: int | None, title: str, go_on: Callable[[], None]
) -> None:
    partial = directory / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir()
    try:
        _write(partial, _chunks(items, how, workers, title, go_on), how.vocab_size)
        for name in (ROWS, COUNTS, META):  # the last one tells that the others are whole
            os.replace(partial / name, directory / name)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {directory} cannot be written ({error}); make room there, or name another directory"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(directory: Path, chunks: Iterator["_Chunk"], vocab_size: int) -> None:
    counts: dict[str, torch.Tensor] = {}
    meta: dict[str, Any] = {"unsupervised": [], "truncated": 0, "supervised_tokens_cut": 0}
    digest = hashlib.sha256()
    with pa.OSFile(str(directory / ROWS), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for chunk in chunks:
            writer.write_batch(chunk.rows)
            digest.update(chunk.digests)
            for name in meta:
                meta[name] += chunk.meta[name]
            for source, (ids, times) in chunk.counts.items():
                counts.setdefault(source, torch.zeros(vocab_size, dtype=torch.long))[ids] += times
    meta |= {"sources": sorted(counts), "fingerprint": digest.hexdigest()[:16]}
    none = torch.zeros(0, vocab_size, dtype=torch.long)
    stacked = torch.stack([counts[source] for source in meta["sources"]]) if counts else none
    save_file({"counts": stacked}, directory / COUNTS)
    meta["bytes"] = _sizes(directory)
    (directory / META).write_text(json.dumps(meta))


@dataclass(frozen=True)
class _Chunk:
    """What some items gave."""

    rows: pa.RecordBatch
    digests: bytes
    counts: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """The ids that the assistant wrote, and how often each."""
    meta: dict[str, Any]

    @classmethod
    def of(cls, documents: TokenizedDataset) -> "_Chunk":
        rows = documents.rows
        columns = [[row.id for row in rows], [row.source for row in rows]]
        lists = [[row.input_ids for row in rows], [row.loss_mask for row in rows]]
        batch = pa.record_batch([*columns, *lists], schema=SCHEMA)
        counts = {source: (found.nonzero()[:, 0], found[found > 0]) for source, found in documents.counts.items()}
        names = ("unsupervised", "truncated", "supervised_tokens_cut")
        return cls(batch, b"".join(map(row_digest, rows)), counts, {name: getattr(documents, name) for name in names})


def _chunks(
    items: Items, how: Tokenizing, workers: int | None, title: str, go_on: Callable[[], None]
) -> Iterator[_Chunk]:
    """In the order of the items, whoever makes them."""
    progress = Progress(title, len(items), quiet=True)
    count = min(os.cpu_count() or 1, MOST_WORKERS) if workers is None else workers
    alone = len(items) < ITEMS_FOR_WORKERS or count < 2
    places = [(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
    made = _here(items, how, places) if alone else _elsewhere(items, how, places, count, go_on)
    for (start, end), chunk in zip(places, made, strict=True):
        progress.advance(by=end - start)
        go_on()
        yield chunk
    progress.close()


def _here(items: Items, how: Tokenizing, places: list[tuple[int, int]]) -> Iterator[_Chunk]:
    for start, end in places:
        yield _Chunk.of(how(items[start:end]))


def _elsewhere(
    items: Items, how: Tokenizing, places: list[tuple[int, int]], count: int, go_on: Callable[[], None]
) -> Iterator[_Chunk]:
    """In processes of their own, a few chunks ahead of what is written."""
    with ProcessPoolExecutor(count, get_context("spawn"), _begin, (items, how)) as pool:
        left, asked = iter(places), list[Future[_Chunk]]()
        try:
            while True:
                for place in islice(left, 2 * count - len(asked)):
                    go_on()  # a process that starts takes seconds
                    with _no_interrupts():
                        asked.append(pool.submit(_work, *place))
                if not asked:
                    return
                while not asked[0].done():
                    wait(asked[:1], LOOK_SECONDS)
                    go_on()
                yield asked.pop(0).result()
        except BrokenProcessPool:
            raise UserError(
                "data.workers: a process that tokenised was killed, most likely for want of memory; set data.workers=1"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started here, in any thread, take no notice of Ctrl-C: the one that writes ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_given: tuple[Items, Tokenizing]


def _begin(items: Items, how: Tokenizing) -> None:
    global _given
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _given = items, how


def _end_with_parent() -> None:
    """One that was killed, or left without a word, ends nobody else by itself."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(start: int, end: int) -> _Chunk:
    items, how = _given
    return _Chunk.of(how(items[start:end]))
