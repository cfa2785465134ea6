"""Tokenized conversations: rows that fit, counts of what was left out, and their cache on disk.

Rows are tokenized once, by several processes for a long file, and stored as an Arrow file that is mapped into memory.
The directory's name is a hash of everything that shapes the rows, so a later run finds them again.
"""

import hashlib
import json
import os
import signal
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, compress, groupby, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.chat_template import tokenize, tokenizer_digest
from nemo_speculative.data.conversations import Conversation, Conversations, TokenRow
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock, file_sizes, read_manifest, write_manifest
from nemo_speculative.utils.progress import Progress

VERSION = 1
"""Raised when the same conversations would give other rows."""
CHUNK = 512
"""Conversations tokenized at once, and rows of one batch of the file."""
MIN_ITEMS_FOR_WORKERS = 4096
"""Number of conversations below which starting further processes takes longer than they save."""
MAX_WORKERS = 8
POLL_SECONDS = 0.2
"""Seconds between two checks whether the rows are still needed."""
ROWS, COUNTS, META = "rows.arrow", "counts.safetensors", "meta.json"
LEFT_OUT = ("unsupervised", "truncated", "supervised_tokens_cut")
"""Fields of :class:`TokenizedDataset` that are summed over the chunks."""
SCHEMA = pa.schema(
    {"id": pa.string(), "source": pa.string(), "input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
)


@dataclass
class TokenizedDataset:
    """Token rows, and counts of the conversations that gave none."""

    vocab_size: int
    """Number of ids of the target."""
    rows: Sequence[TokenRow] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    """Ids left out because none of their tokens is supervised (within the maximum length)."""
    truncated: int = 0
    supervised_tokens_cut: int = 0
    directory: Path | None = None
    """The directory of the stored rows; None: they are in memory only."""

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return array("i", (len(row.input_ids) for row in self.rows))

    @cached_property
    def counts(self) -> dict[str, torch.Tensor]:
        """int64 [V] for each source: how often the assistant wrote each id."""
        by_source: dict[str, list[TokenRow]] = {}
        for row in self.rows:
            by_source.setdefault(row.source, []).append(row)
        return {source: count_supervised(rows, self.vocab_size) for source, rows in sorted(by_source.items())}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows in their order."""
        return hashlib.sha256(b"".join(map(_row_digest, self.rows))).hexdigest()[:16]

    @property
    def all_counts(self) -> torch.Tensor:
        """int64 [V]: the sum of ``counts`` over the sources."""
        return sum(self.counts.values(), torch.zeros(self.vocab_size, dtype=torch.long))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def report(self) -> str:
        """One line: rows, tokens, supervised share, and what was left out."""
        line = f"{len(self.rows)} conversations, {self.tokens} tokens, "
        line += f"{int(self.all_counts.sum()) / max(self.tokens, 1):.0%} supervised"
        if self.truncated:
            line += f"; {self.truncated} cut to length, losing {self.supervised_tokens_cut} supervised tokens"
        if self.unsupervised:
            examples = ", ".join(self.unsupervised[:3]) + (", …" if len(self.unsupervised) > 3 else "")
            line += f"; {len(self.unsupervised)} without a supervised token left out ({examples})"
        return line


def _row_digest(row: TokenRow) -> bytes:
    """16-byte hash of a row's id, tokens and mask."""
    identity = row.id.encode()
    digest = hashlib.sha256(len(identity).to_bytes(4, "little") + identity)
    digest.update(array("i", row.input_ids).tobytes() + bytes(row.loss_mask))
    return digest.digest()[:16]


def count_supervised(rows: Iterable[TokenRow], vocab_size: int) -> torch.Tensor:
    """int64 [V]: how often the assistant wrote each id."""
    ids = np.fromiter((i for row in rows for i in compress(row.input_ids, row.loss_mask)), np.int64)
    return torch.from_numpy(np.bincount(ids, minlength=vocab_size))


def preview(row: TokenRow, tokenizer, color: bool) -> str:
    """The text of a row with the assistant's tokens in green (or in brackets)."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    text = ""
    for supervised, run in groupby(zip(row.input_ids, row.loss_mask, strict=True), key=lambda token: token[1]):
        decoded = tokenizer.decode([token_id for token_id, _ in run])
        text += start + decoded + end if supervised else decoded
    return text


@dataclass(frozen=True)
class Tokenization:
    """The settings by which conversations become rows."""

    tokenizer: Any
    stop_ids: Collection[int]
    max_length: int
    vocab_size: int

    def __call__(self, items: Iterable[Conversation | TokenRow]) -> TokenizedDataset:
        """Tokenizes, checks and truncates ``items``; raises UserError if one cannot be trained on."""
        rows: list[TokenRow] = []
        dataset = TokenizedDataset(self.vocab_size, rows)
        for item in items:
            if isinstance(item, Conversation) and not item.has_answer:
                raise UserError(
                    f"{item.origin}: the conversation has no assistant turn, so there is nothing to train on; add "
                    "one, or let the target answer with data.answers=target"
                )
            row = item if isinstance(item, TokenRow) else tokenize(self.tokenizer, item, self.stop_ids)
            if (largest := max(row.input_ids, default=0)) >= self.vocab_size:
                raise UserError(
                    f"{row.origin}: token id {largest} is not in the target's vocabulary of {self.vocab_size}"
                )
            cut = row.cut(self.max_length)
            if cut is not row:
                dataset.truncated += 1
                dataset.supervised_tokens_cut += sum(row.loss_mask) - sum(cut.loss_mask)
            if any(cut.loss_mask):
                rows.append(cut)
            else:
                dataset.unsupervised.append(row.id)
        return dataset

    def key(self, items: Conversations) -> str:
        """Hash of everything that shapes the rows of ``items``."""
        settings = [VERSION, tokenizer_digest(self.tokenizer), sorted(self.stop_ids), self.max_length, self.vocab_size]
        return hashlib.sha256(json.dumps([items.fingerprint, *settings]).encode()).hexdigest()[:16]


def load_or_tokenize(
    items: Conversations,
    tokenization: Tokenization,
    config: DataConfig,
    title: str,
    check_canceled: Callable[[], None] = lambda: None,
) -> TokenizedDataset:
    """The rows of ``items``, in the order of the file that they were selected from.

    Read from the cache directory of ``config`` if the same content was tokenized with the same settings before.

    Args:
        title: of the progress bar.
        check_canceled: called regularly while rows are tokenized; raises if they are no longer needed.

    Raises:
        UserError: a conversation cannot be tokenized, a worker process was killed, or the disk is full.
    """
    items = items.in_order()
    directory = Path(config.cache_dir) / "tokens" / tokenization.key(items)
    with dir_lock(directory, "data.cache_dir", wait=True):
        if not _is_complete(directory):
            chunks = _tokenize_chunks(items, tokenization, config, title, check_canceled)
            _create(directory, chunks, tokenization.vocab_size)
    meta, rows = json.loads((directory / META).read_text()), StoredRows(directory / ROWS)
    left_out = {name: meta[name] for name in LEFT_OUT}
    dataset = TokenizedDataset(tokenization.vocab_size, rows, directory=directory, **left_out)
    # Without these, each would read every row.
    dataset.lengths = array("i", pa.compute.list_value_length(rows.table["input_ids"]).to_numpy().tobytes())
    dataset.counts = dict(zip(meta["sources"], load_file(directory / COUNTS)["counts"], strict=True))
    dataset.fingerprint = meta["fingerprint"]
    return dataset


class StoredRows(Sequence[TokenRow]):
    """The rows of an Arrow file, mapped into memory and read when they are indexed; a slice is a list of them."""

    def __init__(self, file: Path):
        self._file, self.table = file, pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        batches = self.table.to_batches()
        self._columns = [batch.columns for batch in batches]
        self._starts = list(accumulate((len(batch) for batch in batches), initial=0))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        if isinstance(at, range):
            return [self[i] for i in at]
        # Rows of the table's columns, which look up the batch for each value, take twice as long.
        number = bisect_right(self._starts, at) - 1
        identity, source, ids, mask = (column[at - self._starts[number]] for column in self._columns[number])
        values = ids.values.to_numpy().tolist(), mask.values.to_numpy(zero_copy_only=False).tolist()
        return TokenRow(identity.as_py(), *values, f"{self._file}:{at}", source.as_py())


def _is_complete(directory: Path) -> bool:
    try:
        meta = read_manifest(directory / META)
        return meta is not None and meta["bytes"] == file_sizes(directory, (ROWS, COUNTS))
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class _Chunk:
    """A :class:`TokenizedDataset` as a worker process returns it: its rows as the file holds them."""

    rows: pa.RecordBatch
    digests: bytes
    counts: dict[str, tuple[np.ndarray, np.ndarray]]
    """For each source, the ids that the assistant wrote, and how often each."""
    left_out: dict[str, Any]

    @classmethod
    def of(cls, dataset: TokenizedDataset) -> "_Chunk":
        rows = dataset.rows
        columns: list[Any] = [[row.id for row in rows], [row.source for row in rows]]
        columns += [[row.input_ids for row in rows], [row.loss_mask for row in rows]]
        batch, digests = pa.record_batch(columns, schema=SCHEMA), b"".join(map(_row_digest, rows))
        counts = {source: (np.flatnonzero(n), n[n > 0].numpy()) for source, n in dataset.counts.items()}
        return cls(batch, digests, counts, {name: getattr(dataset, name) for name in LEFT_OUT})


def _create(directory: Path, chunks: Iterator[_Chunk], vocab_size: int) -> None:
    """Writes the rows of ``chunks`` and their counts; meta.json comes last: it marks the others as complete."""
    (directory / META).unlink(missing_ok=True)
    counts: dict[str, torch.Tensor] = {}
    meta: dict[str, Any] = {"unsupervised": [], "truncated": 0, "supervised_tokens_cut": 0}
    digest = hashlib.sha256()
    try:
        with pa.OSFile(str(directory / ROWS), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for chunk in chunks:
                writer.write_batch(chunk.rows)
                digest.update(chunk.digests)
                for name in LEFT_OUT:
                    meta[name] += chunk.left_out[name]
                for source, (ids, times) in chunk.counts.items():
                    counts.setdefault(source, torch.zeros(vocab_size, dtype=torch.long)).numpy()[ids] += times
        meta |= {"sources": sorted(counts), "fingerprint": digest.hexdigest()[:16]}
        empty = torch.zeros(0, vocab_size, dtype=torch.long)
        stacked = torch.stack([counts[source] for source in meta["sources"]]) if counts else empty
        save_file({"counts": stacked}, directory / COUNTS)
        meta["bytes"] = file_sizes(directory, (ROWS, COUNTS))
        write_manifest(directory / META, meta, indent=None)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {directory} cannot be written ({error}); make room there, or name another directory"
        ) from None
    finally:
        if not (directory / META).is_file():
            for name in (ROWS, COUNTS):
                (directory / name).unlink(missing_ok=True)


def _tokenize_chunks(
    items: Conversations, tokenization: Tokenization, config: DataConfig, title: str, check_canceled: Callable[[], None]
) -> Iterator[_Chunk]:
    """Chunks in the order of ``items``, from this process or from ``config.workers`` others."""
    progress = Progress(title, len(items), quiet=True)
    count = min(os.cpu_count() or 1, MAX_WORKERS) if config.workers is None else config.workers
    parts = [slice(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
    if len(items) < MIN_ITEMS_FOR_WORKERS or count < 2:
        chunks: Iterator[_Chunk] = (_Chunk.of(tokenization(items[part])) for part in parts)
    else:
        chunks = _tokenize_in_workers(items, tokenization, parts, count, check_canceled)
    for part, chunk in zip(parts, chunks, strict=True):
        progress.advance(by=part.stop - part.start)
        check_canceled()
        yield chunk
    progress.close()


def _tokenize_in_workers(
    items: Conversations, tokenization: Tokenization, parts: list[slice], count: int, check_canceled: Callable[[], None]
) -> Iterator[_Chunk]:
    """Chunks of ``count`` worker processes, which stay at most 2 chunks each ahead of the writer."""
    with ProcessPoolExecutor(count, get_context("spawn"), _start_worker, (items, tokenization)) as pool:
        remaining, pending = iter(parts), list[Future[_Chunk]]()
        try:
            while True:
                for part in islice(remaining, 2 * count - len(pending)):
                    check_canceled()  # starting a process takes seconds
                    # A process that is started here ignores Ctrl-C: the parent ends it.
                    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                    try:
                        pending.append(pool.submit(_tokenize_in_worker, part))
                    finally:
                        signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if not pending:
                    return
                while not pending[0].done():
                    wait(pending[:1], POLL_SECONDS)
                    check_canceled()
                yield pending.pop(0).result()
        except BrokenProcessPool:
            raise UserError(
                "data.workers: a process that tokenized was killed, most likely for lack of memory; set data.workers=1"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: tuple[Conversations, Tokenization]
"""The arguments of a worker process, which are sent once."""


def _start_worker(items: Conversations, tokenization: Tokenization) -> None:
    global _worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = items, tokenization


def _exit_with_parent() -> None:
    """Ends this worker when its parent is gone, since a killed parent ends no workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(part: slice) -> _Chunk:
    items, tokenization = _worker
    return _Chunk.of(tokenization(items[part]))
