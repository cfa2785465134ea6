"""Shards of a feature directory: ``<name>.safetensors``, the rows of many documents end to end, and an index.

``<name>.json`` holds for each document where its rows are and their checksum, and the length of the safetensors file.
The name is a hash of the documents' keys, so several writers can share a directory.  The index is written last: a shard
that has one is complete.
"""

import ctypes
import json
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import Batch, Span, supervision_mask
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, SCALE, Manifest, Tensors
from nemo_speculative.targets.remote.protocol import safetensors_header, tensor_bytes
from nemo_speculative.utils.errors import UserError, describe_error
from nemo_speculative.utils.files import atomic_write, atomic_write_text, disk_full_error

MIB = 1 << 20
KEY_BYTES = 16
INDEX_ENTRY = np.dtype(
    [("key", f"S{KEY_BYTES}"), ("aux", "i8"), ("aux_rows", "i8"), ("hidden", "i8"), ("hidden_rows", "i8"),
     ("checksum", "u8")]
)  # fmt: skip
"""A document of a shard: its first row and number of rows of each kind, and the checksum of all of them."""
READ_AHEAD_BYTES = 1 << 17
"""Length of one read-ahead request.  Linux silently truncates longer ones to the device's read-ahead or its largest
request, whichever is longer; on few devices both are below this."""
LIBC = ctypes.CDLL(None)


def document_key(input_ids: torch.Tensor | Sequence[int], loss_mask: torch.Tensor | Sequence[bool]) -> bytes:
    """The name of a document, a 16-byte hash of its token ids [L] and loss mask [L], on the host."""
    ids, mask = torch.as_tensor(input_ids, dtype=torch.long), torch.as_tensor(loss_mask, dtype=torch.bool)
    return xxhash.xxh3_128_digest(ids.numpy().tobytes() + mask.numpy().tobytes())


def document_of(batch: Batch, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss mask, [L] each, of a document of ``batch``, on the host."""
    tokens = span.row, slice(span.start, span.end)
    return batch.on_host.input_ids[tokens], batch.on_host.loss_mask[tokens]


def stored_positions(loss_mask: torch.Tensor, manifest: Manifest) -> tuple[int, torch.Tensor]:
    """The positions of a document (``loss_mask``: bool [L]) that a draft trained as ``manifest`` says reads.

    Slot t of a draft reads the features at or before t of its document, and its labels are the target's outputs at
    t + 1, t + 2, …  Nothing after the last supervised slot is read, so nothing is stored there.  The number of TTT
    steps does not matter: the labels of later steps are those of later slots' first step
    (tests/targets/cached/test_documents.py proves it for every mask convention).

    Returns:
        The number of first positions whose aux states are stored; the positions, ascending int64 [m], whose last hidden
        state is stored.
    """
    row = loss_mask[None]
    convention = MaskConvention(manifest.mask_convention)
    mask = supervision_mask(row, torch.zeros_like(row, dtype=torch.long), 1, convention)
    slots = mask[0, 0].nonzero()[:, 0]
    attended = int(slots[-1]) + 1 if len(slots) else 0
    if manifest.last_hidden == "supervised":
        return attended, slots + 1
    return attended, torch.arange(attended + 1 if attended else 0)


def checksum(tensors: Tensors) -> int:
    """Checksum of a document's numbers."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.intdigest()


def write_shard(directory: Path, documents: Mapping[bytes, Tensors]) -> Path:
    """Writes documents, by key, as one shard; returns the path of its index.  Raises UserError if the disk is full."""
    digest = xxhash.xxh3_128(b"".join(documents)).hexdigest()
    shard, index = directory / f"{digest}.safetensors", directory / f"{digest}.json"
    with disk_full_error(
        f"{directory}: the disk is full, and {shard.name} was not written; earlier shards are complete: free some "
        "space and run the same command again to resume"
    ):
        with atomic_write(shard) as file:
            _write_safetensors(file, documents)
        atomic_write_text(index, _index_text(documents, shard))
    return index


def _write_safetensors(file: BinaryIO, documents: Mapping[bytes, Tensors]) -> None:
    """Writes the documents' tensors one after the other; the safetensors library would first copy them together."""
    parts: dict[str, list[torch.Tensor]] = {}
    for tensors in documents.values():
        for name, x in tensors.items():
            parts.setdefault(name, []).append(x)
    # The widest dtype first, so that every tensor is aligned.
    names = sorted(parts, key=lambda name: -parts[name][0].element_size())
    shapes = {name: (parts[name][0].dtype, [sum(map(len, parts[name])), parts[name][0].shape[1]]) for name in names}
    file.write(safetensors_header(shapes))
    for x in chain.from_iterable(parts[name] for name in names):
        file.write(tensor_bytes(x))


def _index_text(documents: Mapping[bytes, Tensors], shard: Path) -> str:
    entries, ends = [], {AUX: 0, LAST_HIDDEN: 0}
    for key, tensors in documents.items():
        entry: list[Any] = [key.hex()]
        for kind in ends:
            rows = len(tensors.get(kind, ()))
            entry += [ends[kind], rows]
            ends[kind] += rows
        entries.append([*entry, f"{checksum(tensors):016x}"])
    index = {"shard": shard.name, "bytes": shard.stat().st_size, "rows": ends, "documents": entries}
    return json.dumps({"index": index, "checksum": _index_checksum(index)}) + "\n"


def _index_checksum(index: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(index, sort_keys=True).encode())


class Shard:
    """A complete shard; its tensors are memory-mapped when the first is read.  Raises UserError if it is damaged."""

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
            raise UserError(f"{index}: the index is damaged ({describe_error(error, 100)}): {self._remedy}") from None
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing: {self._remedy}")
        if (size := self.path.stat().st_size) != self.size:
            raise UserError(f"{self.path} has {size} bytes, its index says {self.size}: {self._remedy}")
        self._tensors: Tensors | None = None
        self._checked = np.zeros(len(self.entries), dtype=bool)

    def document(self, number: int) -> Tensors:
        """The tensors of a document, views of the file; raises UserError if they do not match their checksum."""
        self._tensors = self._tensors or self._open()
        key, aux, aux_rows, hidden, hidden_rows, expected = self.entries[number].tolist()
        tensors = {}
        for name, x in self._tensors.items():
            rows = x[aux : aux + aux_rows] if name.startswith(AUX) else x[hidden : hidden + hidden_rows]
            if len(rows):
                _read_ahead(rows)
                tensors[name] = rows
        if not self._checked[number]:
            if checksum(tensors) != expected:
                raise UserError(
                    f"{self.path} is damaged: the checksum of document {key.hex()} does not match: {self._remedy}"
                )
            self._checked[number] = True
        return tensors

    def _open(self) -> Tensors:
        names = [name for name in self.manifest.layout if self.rows[name.removesuffix(SCALE)]]
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} is damaged ({describe_error(error, 100)}): {self._remedy}") from None
        for name, x in tensors.items():
            dtype, width = self.manifest.layout[name]
            if (shape := [self.rows[name.removesuffix(SCALE)], width]) != list(x.shape) or x.dtype != dtype:
                raise UserError(
                    f"{self.path}: {name} is {x.dtype} of {list(x.shape)}, expected {dtype} of {shape}: {self._remedy}"
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
        self._documents: dict[bytes, Tensors] = {}
        self._nbytes, self._keys = 0, set[bytes]()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._pending: list[Future[Path]] = []

    def add(self, batch: Batch, span: Span, output: TargetOutput) -> None:
        """Adds the document of ``span``, waiting for a disk that is slower; raises UserError if the disk is full."""
        ids, mask = document_of(batch, span)
        if (key := document_key(ids, mask)) in self._keys:
            return
        self._keys.add(key)
        num_aux, positions = stored_positions(mask, self.manifest)
        tokens = span.row, slice(span.start, span.end)
        aux, hidden = output.aux_hidden_states[tokens][:num_aux], output.last_hidden_state[tokens]
        hidden = hidden.index_select(0, positions.to(hidden.device))
        tensors: Tensors = {}
        for kind, x in ((AUX, aux), (LAST_HIDDEN, hidden)):
            if x.numel():
                parts = self.manifest.encode(kind, x)
                # Always a copy: a view would keep the whole batch in memory.
                tensors |= {name: part.to("cpu", copy=True) for name, part in parts.items()}
        self._documents[key] = tensors
        self._nbytes += sum(x.nbytes for x in tensors.values())
        if self._nbytes >= self.shard_bytes:
            self._submit()

    def _submit(self) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) > 1):
            self._pending.pop(0).result()  # raises what failed
        self._pending.append(self._thread.submit(write_shard, self.directory, self._documents))
        self._documents, self._nbytes = {}, 0

    def flush(self) -> None:
        """Writes all documents added so far, and waits for the disk; raises UserError if the disk is full."""
        if self._documents:
            self._submit()
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """Flushes and ends the thread."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()
