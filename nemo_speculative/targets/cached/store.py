"""Feature directories: the target's hidden states on disk, captured once, read by any number of trainings.

A directory holds ``manifest.json`` (:mod:`.manifest`) and shards of documents (:mod:`.shards`), looked up by content.
"""

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import xxhash

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, MANIFEST_FILE, Manifest, Tensors
from nemo_speculative.targets.cached.shards import KEY_BYTES, Shard, document_key, stored_positions
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress

TRAINING, HELD_OUT = "training.jsonl", "held_out.jsonl"
"""Files with the captured documents themselves."""
GB = 1e9
Location = tuple[int, int]
"""Number of a shard, and number of a document in it."""


class FeatureStore:
    """The shards of ``directory``; several threads may read.  Raises UserError if a shard is damaged or missing."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.shards: list[Shard] = []
        self._indices: set[Path] = set()
        self._refreshing = threading.Lock()
        self._lookup = np.zeros(0, f"S{KEY_BYTES}"), np.zeros((0, 2), np.int64)
        """The keys of all documents, sorted, and the location of each."""
        self.refresh()

    def refresh(self) -> None:
        """Finds shards that were completed since the last call."""
        with self._refreshing:
            new = sorted(set(self.directory.glob("*.json")) - self._indices - {self.directory / MANIFEST_FILE})
            if not new:
                return
            self.shards += [Shard(index, self.manifest) for index in new]
            self._indices |= set(new)
            keys = np.concatenate([shard.entries["key"] for shard in self.shards])
            locations = np.array([(s, d) for s, shard in enumerate(self.shards) for d in range(len(shard.entries))])
            # A document is in two shards after a merge, or where two ranks computed it: the first one counts.
            keys, first = np.unique(keys, return_index=True)
            self._lookup = keys, locations.reshape(-1, 2)[first]

    def __len__(self) -> int:
        return len(self._lookup[0])

    def find(self, keys: Sequence[bytes]) -> list[Location | None]:
        """The location of each document, or None if it is not stored."""
        stored, locations = self._lookup
        if not len(stored) or not keys:
            return [None] * len(keys)
        queries = np.array(keys, dtype=stored.dtype)
        at = np.searchsorted(stored, queries).clip(max=len(stored) - 1)
        hits = (stored[at] == queries).tolist()
        return [tuple(place) if hit else None for place, hit in zip(locations[at].tolist(), hits, strict=True)]

    def tensors(self, location: Location) -> Tensors:
        """The stored tensors of a document, views of the file; raises UserError if its shard is damaged."""
        shard, document = location
        return self.shards[shard].document(document)

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def content(self) -> str:
        """A hash of the keys."""
        return xxhash.xxh3_128_hexdigest(self._lookup[0].tobytes())


class Budget:
    """The documents of ``parts``, end to end, that ``store`` lacks, without duplicates, and their size."""

    def __init__(self, store: FeatureStore, *parts: Sequence[TokenRow]):
        self.manifest = store.manifest
        self.missing: list[int] = []
        """Position of each missing document in the sequence of all documents."""
        self.lengths: list[int] = []
        """Number of tokens of each missing document."""
        self.first = ""
        """Id of the first missing document."""
        self.present = 0
        """Number of documents that are stored already."""
        self.positions = {AUX: 0, LAST_HIDDEN: 0}
        """Number of positions to store, by kind."""
        keys: set[bytes] = set()
        progress = Progress("looking up features", sum(map(len, parts)), quiet=True)
        for number, row in enumerate(chain(*parts)):
            progress.advance()
            if (key := document_key(row.input_ids, row.loss_mask)) in keys:
                continue
            keys.add(key)
            if store.find([key])[0] is not None:
                self.present += 1
                continue
            self.first = self.first or row.id
            self.missing.append(number)
            self.lengths.append(len(row.input_ids))
            num_aux, last_hidden = stored_positions(torch.tensor(row.loss_mask, dtype=torch.bool), store.manifest)
            self.positions[AUX] += num_aux
            self.positions[LAST_HIDDEN] += len(last_hidden)
        progress.close()

    @property
    def nbytes(self) -> int:
        """Size of the missing features."""
        return sum(self.positions[kind] * size for kind, size in self.manifest.bytes_per_position.items())

    def report(self, directory: Path) -> str:
        """One line: documents, bytes per token, total size, and free space."""
        if not self.missing:
            return f"features: all {self.present} documents are in {directory}; nothing is missing"
        tokens = sum(self.lengths)
        kinds = ", ".join(
            f"{kind} at {self.positions[kind] / tokens:.0%} ({size} B)"
            for kind, size in self.manifest.bytes_per_position.items()
        )
        present = f" ({self.present} more are present)" if self.present else ""
        return (
            f"features: {len(self.missing)} documents{present}, {tokens} tokens, {kinds}, as "
            f"{self.manifest.stored}: {self.nbytes / tokens:.0f} bytes a token, {self.nbytes / GB:.3g} GB in all; "
            f"{free_bytes(directory) / GB:.3g} GB free in {directory}"
        )

    def require_room(self, directory: Path, key: str) -> None:
        """Raises UserError if the disk of ``directory``, which the configuration key ``key`` names, is too small."""
        needed, free = self.nbytes * 1.01, free_bytes(directory)  # 1 % for indices and the file system's own data
        if needed > free:
            raise UserError(
                f"{key}: the features take {needed / GB:.3g} GB and {directory} has {free / GB:.3g} GB free; make "
                "room, choose another disk, capture fewer conversations, or capture with dtype=fp8"
            )


def free_bytes(directory: Path) -> int:
    """Free space of the disk on which ``directory``, which need not exist yet, would be."""
    directory = directory.absolute()
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free


def require_same_manifest(directory: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of ``directory``, or None; raises UserError if it holds features of another kind, or other files."""
    if existing := Manifest.read(directory):
        existing.require_same(manifest, directory, ignored=())
    elif any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds safetensors files and no manifest.json: expected an empty or new directory")
    return existing


def prepare_directory(directory: Path, manifest: Manifest) -> Manifest:
    """Makes ``directory`` a feature directory like ``manifest``, checked as above; returns the manifest that it has."""
    existing = require_same_manifest(directory, manifest)
    if existing is None:
        manifest.write(directory)
    return existing or manifest


def remove_partial_files(directory: Path) -> None:
    """Removes the unfinished files of a killed writer; only for the process that holds the directory's lock."""
    for partial in directory.glob("*.partial"):
        if not partial.name.startswith(MANIFEST_FILE):  # other ranks may be writing that one
            partial.unlink()


def open_store(directory: str | Path, key: str) -> FeatureStore:
    """The store of ``directory``, named by the configuration key ``key``; raises UserError if it is not complete."""
    manifest = Manifest.read(Path(directory))
    if manifest is None:
        raise UserError(f"{key}: {directory} has no manifest.json; expected the output of recipes/capture_features.py")
    store = FeatureStore(Path(directory), manifest)
    if len(store) < manifest.documents:
        raise UserError(
            f"{directory} holds {len(store)} documents and its {MANIFEST_FILE} says {manifest.documents}: shards were "
            "removed; restore them, or capture again, which adds what is missing"
        )
    return store


def seal(directory: Path) -> str:
    """Writes the number of documents and their hash into the manifest; returns a summary line."""
    manifest = Manifest.read(directory)
    assert manifest, "the directory was prepared"
    store = FeatureStore(directory, manifest)
    replace(manifest, documents=len(store), content=store.content).write(directory)
    return (
        f"{directory}: {len(store)} documents in {len(store.shards)} shards, {store.nbytes / GB:.3g} GB "
        f"({manifest.stored})"
    )


def merge(sources: Sequence[str], output: str) -> str:
    """Links the shards of ``sources`` into ``output``, or copies them to another disk; returns a summary line."""
    stores = [open_store(source, "merge") for source in sources]
    into = Path(output)
    with dir_lock(into, "output"):
        for store in stores:
            prepare_directory(into, store.manifest)
        for store in stores:
            for shard in store.shards:
                for file in (shard.path, shard.path.with_suffix(".json")):  # the index last
                    _link_or_copy(file, into / file.name)
            for name in (TRAINING, HELD_OUT):
                _append_new_lines(store.directory / name, into / name)
        return seal(into)


def _link_or_copy(file: Path, to: Path) -> None:
    if to.exists():  # a shard's name is a hash of its content
        return
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    partial.rename(to)


def _append_new_lines(source: Path, to: Path) -> None:
    present = set(to.open()) if to.exists() else set()
    if source.exists():
        with source.open() as lines, to.open("a") as out:
            out.writelines(line for line in lines if line not in present)


def verify(directory: str) -> str:
    """Compares every document of ``directory`` with its checksum, see :func:`open_store`; returns a summary line."""
    store = open_store(directory, "output")
    for shard in store.shards:
        for number in range(len(shard.entries)):
            shard.document(number)
    return f"{directory}: {len(store)} documents, {store.nbytes / GB:.3g} GB, every checksum is right"
