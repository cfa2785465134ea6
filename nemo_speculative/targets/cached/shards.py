"""Shards of a feature directory: ``<name>.safetensors``, the rows of many documents end to end, and an index.

``<name>.json`` holds for each document where its rows are and their checksum, and the length of the safetensors file.
The name is a hash of the documents' keys, so several writers can share a directory.  The index is written last: a shard
that has one is complete.
"""

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.documents import KEY_BYTES, Document
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest, Tensors
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write, atomic_write_text, disk_full_error

MIB = 1 << 20
SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"
}  # fmt: skip
INDEX_ENTRY = np.dtype(
    [("key", f"S{KEY_BYTES}"), ("aux", "i8"), ("aux_rows", "i8"), ("hidden", "i8"), ("hidden_rows", "i8"),
     ("checksum", "u8")]
)  # fmt: skip
"""A document of a shard: its first row and number of rows of each kind, and the checksum of all of them."""
READ_AHEAD_BYTES = 1 << 17
"""Length of one read-ahead request.  Linux silently truncates longer ones to the device's read-ahead or its largest
request, whichever is longer; on few devices both are below this."""
LIBC = ctypes.CDLL(None)


def checksum(tensors: Tensors) -> int:
    """Checksum of a document's numbers."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(_bytes_of(tensors[name]))
    return digest.intdigest()


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.contiguous().view(torch.uint8).flatten().numpy().data


def write_shard(directory: Path, documents: Sequence[Document]) -> Path:
    """Writes ``documents`` as one shard and returns the path of its index.

    Raises:
        UserError: the disk is full; the unfinished file is removed.
    """
    digest = xxhash.xxh3_128(b"".join(document.key for document in documents)).hexdigest()
    shard, index = directory / f"{digest}.safetensors", directory / f"{digest}.json"
    with disk_full_error(
        f"{directory}: the disk is full, and {shard.name} was not written; earlier shards are complete: free some "
        "space and run the same command again to resume"
    ):
        with atomic_write(shard) as file:
            _write_safetensors(file.fileno(), documents)
        atomic_write_text(index, _index_text(documents, shard))
    return index


def _write_safetensors(file: int, documents: Sequence[Document]) -> None:
    """Writes the documents' tensors one after the other; the safetensors library would first copy them together."""
    parts: dict[str, list[torch.Tensor]] = {}
    for document in documents:
        for name, x in document.tensors.items():
            parts.setdefault(name, []).append(x)
    # The widest dtype first, so that every tensor is aligned.
    names = sorted(parts, key=lambda name: -parts[name][0].element_size())
    described, end = {}, 0
    for name in names:
        start, rows = end, sum(map(len, parts[name]))
        end += sum(x.nbytes for x in parts[name])
        shape = [rows, parts[name][0].shape[1]]
        dtype = SAFETENSORS_DTYPES[parts[name][0].dtype]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    pieces = [memoryview(len(header).to_bytes(8, "little") + header), *(_bytes_of(x) for n in names for x in parts[n])]
    for piece in pieces:
        while piece:
            piece = piece[os.write(file, piece) :]


def _index_text(documents: Sequence[Document], shard: Path) -> str:
    entries, starts = [], {AUX: 0, LAST_HIDDEN: 0}
    for document in documents:
        rows = {kind: document.rows(kind) for kind in starts}
        ranges = [n for kind in starts for n in (starts[kind], rows[kind])]
        entries.append([document.key.hex(), *ranges, f"{checksum(document.tensors):016x}"])
        starts = {kind: start + rows[kind] for kind, start in starts.items()}
    index = {"shard": shard.name, "bytes": shard.stat().st_size, "rows": starts, "documents": entries}
    return json.dumps({"index": index, "checksum": _index_checksum(index)}) + "\n"


def _index_checksum(index: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(index, sort_keys=True).encode())


class Shard:
    """A complete shard; its tensors are memory-mapped when the first of them is read.

    Raises:
        UserError: the index is damaged, or the safetensors file is missing or has another length.
    """

    def __init__(self, index: Path, manifest: Manifest):
        self.manifest = manifest
        self._remedy = f"restore it from a copy, or remove {index.with_suffix('')}.* and capture again, which adds "
        self._remedy += "what is missing"
        try:
            content = json.loads(index.read_bytes())
            fields = content["index"]
            if _index_checksum(fields) != content["checksum"]:
                raise ValueError("its checksum does not match")
            self.path, self.size, self.rows = index.with_name(fields["shard"]), fields["bytes"], fields["rows"]
            entries = [(bytes.fromhex(key), *rows, int(digest, 16)) for key, *rows, digest in fields["documents"]]
            self.entries = np.array(entries, dtype=INDEX_ENTRY)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{index}: the index is damaged ({reason}): {self._remedy}") from None
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing: {self._remedy}")
        if (size := self.path.stat().st_size) != self.size:
            raise UserError(f"{self.path} has {size} bytes, its index says {self.size}: {self._remedy}")
        self._tensors: Tensors | None = None
        self._checked = np.zeros(len(self.entries), dtype=bool)

    def document(self, number: int) -> Tensors:
        """The tensors of a document, views of the file; the first read compares them with their checksum.

        Raises:
            UserError: the shard is damaged.
        """
        self._tensors = self._tensors or self._open()
        entry = self.entries[number]
        rows = {
            AUX: slice(int(entry["aux"]), int(entry["aux"] + entry["aux_rows"])),
            LAST_HIDDEN: slice(int(entry["hidden"]), int(entry["hidden"] + entry["hidden_rows"])),
        }
        tensors = {name: x[rows[AUX if name.startswith(AUX) else LAST_HIDDEN]] for name, x in self._tensors.items()}
        tensors = {name: x for name, x in tensors.items() if len(x)}
        for x in tensors.values():
            _read_ahead(x)
        if not self._checked[number]:
            if checksum(tensors) != int(entry["checksum"]):
                raise UserError(
                    f"{self.path} is damaged: the checksum of document {entry['key'].hex()} does not match: "
                    f"{self._remedy}"
                )
            self._checked[number] = True
        return tensors

    def _open(self) -> Tensors:
        layouts = {
            kind + suffix: (dtype, [self.rows[kind], width])
            for kind, layout in self.manifest.layouts.items()
            for suffix, (dtype, width) in layout.items()
            if self.rows[kind]
        }
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in layouts}
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{self.path} is damaged ({reason}): {self._remedy}") from None
        for name, (dtype, shape) in layouts.items():
            if tensors[name].dtype != dtype or list(tensors[name].shape) != shape:
                raise UserError(
                    f"{self.path}: {name} is {tensors[name].dtype} of {list(tensors[name].shape)}, expected {dtype} of "
                    f"{shape}: {self._remedy}"
                )
        return tensors


def _read_ahead(x: torch.Tensor) -> None:
    """Asks the system to read a slice of a mapped file as a whole, before it is touched.

    Page faults alone read either little at a time, or, where the system reads far ahead, mostly other documents, which
    are evicted again before they are used: documents are read in random order.
    """
    end = x.data_ptr() + x.nbytes
    for start in range(x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, READ_AHEAD_BYTES):
        length = min(READ_AHEAD_BYTES, end - start)
        LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


class ShardWriter:
    """Collects documents of target outputs and writes a shard in a thread whenever there are ``shard_bytes`` of them.

    Documents that were added before are skipped.  At most three shards are in memory: one that is being filled, one
    that waits for the disk and one that is being written.
    """

    def __init__(self, directory: Path, manifest: Manifest, shard_bytes: int):
        self.directory, self.manifest, self.shard_bytes = directory, manifest, shard_bytes
        self._documents: list[Document] = []
        self._nbytes, self._keys = 0, set[bytes]()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._free_slots, self._pending = threading.Semaphore(2), list[Future[Path]]()

    def add(self, key: bytes, batch: Batch, span: Span, output: TargetOutput) -> None:
        """Adds the document of ``span``.  Blocks while the disk is slower than the target.

        Raises:
            UserError: the disk is full.
        """
        if key in self._keys:
            return
        self._keys.add(key)
        document = Document.cut(key, batch, span, output, self.manifest)
        self._documents.append(document)
        self._nbytes += document.nbytes
        if self._nbytes >= self.shard_bytes:
            self._submit()

    def _submit(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()  # raises what failed
        self._free_slots.acquire()
        documents, self._documents, self._nbytes = self._documents, [], 0
        self._pending.append(self._thread.submit(self._write, documents))

    def _write(self, documents: list[Document]) -> Path:
        try:
            return write_shard(self.directory, documents)
        finally:
            self._free_slots.release()

    def flush(self) -> None:
        """Writes all documents added so far, and waits for the disk.

        Raises:
            UserError: the disk is full.
        """
        if self._documents:
            self._submit()
        while self._pending:
            self._pending.pop().result()

    def close(self) -> None:
        """Flushes and ends the thread."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()
