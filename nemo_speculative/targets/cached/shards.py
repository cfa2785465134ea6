"""A shard: ``<name>.safetensors``, whose tensors are the rows of many documents end to end, and its index.

``<name>.json`` says of each document where its rows are and what they hash to, and of the file how long it is.  The
name is a hash of the documents' keys, so shards of several writers lie in one directory.  The index is written last:
a shard that has one is whole.
"""

import ctypes
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest
from nemo_speculative.targets.cached.positions import KEY_BYTES
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write, atomic_write_text, disk_full_error

KINDS = (AUX, LAST_HIDDEN)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
"""safetensors' names."""
ENTRY = np.dtype(
    [("key", f"S{KEY_BYTES}"), ("aux", "i8"), ("aux_rows", "i8"), ("hidden", "i8"), ("hidden_rows", "i8"),
     ("checksum", "u8")]
)  # fmt: skip
"""A document of a shard: its first row and number of rows of each kind, and the hash of all of them."""
ALIGNMENT = 8
WINDOW = 1 << 17
"""Bytes that are asked of the system at a time: of a longer request Linux reads no more than the read-ahead or the
largest request of the device, whichever is longer, and says nothing; few devices have less of both than this."""
LIBC = ctypes.CDLL(None)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Document:
    """What is stored of one document, on the host."""

    key: bytes
    tensors: Tensors
    """By their names in a shard: ``aux``, ``last_hidden_state``, and further parts of the codec."""

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def rows(self, kind: str) -> int:
        return len(self.tensors[kind]) if kind in self.tensors else 0


def checksum(tensors: Tensors) -> int:
    """Of the numbers of a document."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.intdigest()


def _bytes(x: torch.Tensor) -> memoryview:
    return x.contiguous().view(torch.uint8).flatten().numpy().data


def write_shard(directory: Path, documents: Sequence[Document]) -> Path:
    """Writes ``documents``; returns the index.

    Raises:
        UserError: the disk is full; what is unfinished is removed.
    """
    digest = xxhash.xxh3_128(b"".join(document.key for document in documents)).hexdigest()
    shard, index = directory / f"{digest}.safetensors", directory / f"{digest}.json"
    with disk_full_error(
        f"{directory}: the disk is full, and {shard.name} was not written; the shards before it are whole: free some "
        "space, and the same command goes on"
    ):
        with atomic_write(shard) as file:
            _write_tensors(file.fileno(), documents)
        atomic_write_text(index, _index_text(documents, shard))
    return index


def _write_tensors(file: int, documents: Sequence[Document]) -> None:
    """As safetensors has them, one document after the other: what the library writes would first be copied."""
    parts: dict[str, list[torch.Tensor]] = {}
    for document in documents:
        for name, x in document.tensors.items():
            parts.setdefault(name, []).append(x)
    # The widest numbers first, so that all of them lie aligned.
    names = sorted(parts, key=lambda name: -parts[name][0].element_size())
    described, end = {}, 0
    for name in names:
        start, rows = end, sum(map(len, parts[name]))
        end += sum(x.numel() * x.element_size() for x in parts[name])
        shape = [rows, parts[name][0].shape[1]]
        described[name] = {"dtype": DTYPES[parts[name][0].dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    pieces = [memoryview(len(header).to_bytes(8, "little") + header), *(_bytes(x) for n in names for x in parts[n])]
    for piece in pieces:
        _write_all(file, piece)


def _write_all(file: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(file, piece) :]


def _index_text(documents: Sequence[Document], shard: Path) -> str:
    entries, at = [], dict.fromkeys(KINDS, 0)
    for document in documents:
        places = [n for kind in KINDS for n in (at[kind], document.rows(kind))]
        entries.append([document.key.hex(), *places, f"{checksum(document.tensors):016x}"])
        at = {kind: start + document.rows(kind) for kind, start in at.items()}
    said = {"shard": shard.name, "bytes": shard.stat().st_size, "rows": at, "documents": entries}
    return json.dumps({"index": said, "checksum": _index_checksum(said)}) + "\n"


def _index_checksum(said: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(said, sort_keys=True).encode())


class Shard:
    """A finished shard, found by its index; its tensors are mapped into memory when the first of them is read.

    Raises:
        UserError: the index is damaged, or the shard is missing or of another length.
    """

    def __init__(self, index: Path, manifest: Manifest):
        self.manifest = manifest
        self.path, self.size, self.rows, self.entries = _read_index(index)
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing: {_remedy(index)}")
        if (found := self.path.stat().st_size) != self.size:
            raise UserError(f"{self.path} has {found} bytes, its index says {self.size}: {_remedy(index)}")
        self._tensors: Tensors | None = None
        self._checked = np.zeros(len(self.entries), dtype=bool)

    def document(self, number: int) -> Tensors:
        """The tensors of a document, views of the file; compared with its checksum when it is read first.

        Raises:
            UserError: the shard is damaged.
        """
        self._tensors = self._tensors or self._open()
        entry = self.entries[number]
        ranges = {
            AUX: slice(int(entry["aux"]), int(entry["aux"] + entry["aux_rows"])),
            LAST_HIDDEN: slice(int(entry["hidden"]), int(entry["hidden"] + entry["hidden_rows"])),
        }
        found = {name: x[ranges[_kind(name)]] for name, x in self._tensors.items()}
        found = {name: x for name, x in found.items() if len(x)}
        for x in found.values():
            _read_ahead(x)
        if not self._checked[number]:
            if checksum(found) != int(entry["checksum"]):
                raise UserError(
                    f"{self.path} is damaged: document {entry['key'].hex()} is not what was written: "
                    f"{_remedy(self.path.with_suffix('.json'))}"
                )
            self._checked[number] = True
        return found

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
            said = " ".join(str(error).split())[:100]
            raise UserError(f"{self.path} is damaged ({said}): {_remedy(self.path.with_suffix('.json'))}") from None
        for name, (dtype, shape) in layouts.items():
            if tensors[name].dtype != dtype or list(tensors[name].shape) != shape:
                raise UserError(
                    f"{self.path}: {name} is {tensors[name].dtype} of {list(tensors[name].shape)}, expected {dtype} of "
                    f"{shape}: {_remedy(self.path.with_suffix('.json'))}"
                )
        return tensors


def _read_ahead(x: torch.Tensor) -> None:
    """Has the system read a piece of a mapped file as a whole, before it is touched.

    What a page fault alone reads is either little at a time, or, where the system reads far ahead, mostly of other
    documents: they are asked for in random order, so that it is gone again when its turn comes.
    """
    end = x.data_ptr() + x.nbytes
    for start in range(x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, WINDOW):
        length = min(WINDOW, end - start)
        LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def _kind(name: str) -> str:
    return next(kind for kind in KINDS if name.startswith(kind))


def _read_index(index: Path) -> tuple[Path, int, dict[str, int], np.ndarray]:
    try:
        text = json.loads(index.read_bytes())
        said = text["index"]
        if _index_checksum(said) != text["checksum"]:
            raise ValueError("its checksum is not that of what it says")
        rows = [(bytes.fromhex(key), *places, int(hashed, 16)) for key, *places, hashed in said["documents"]]
        return index.with_name(said["shard"]), said["bytes"], said["rows"], np.array(rows, dtype=ENTRY)
    except (ValueError, KeyError, TypeError, OSError) as error:
        said = " ".join(str(error).split())[:100]
        raise UserError(f"{index}: the index is damaged ({said}): {_remedy(index)}") from None


def _remedy(index: Path) -> str:
    return f"put it back from a copy, or remove {index.with_suffix('')}.* and capture again, which adds what is missing"
