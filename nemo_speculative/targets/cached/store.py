"""Feature directories: documents looked up by content, and directories created, opened, sealed, merged and verified."""

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from nemo_speculative.targets.cached.documents import KEY_BYTES
from nemo_speculative.targets.cached.manifest import MANIFEST_FILE, Manifest, Tensors
from nemo_speculative.targets.cached.shards import Shard
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import dir_lock

TRAINING, HELD_OUT = "training.jsonl", "held_out.jsonl"
"""Files with the captured documents themselves."""
GB = 1e9
Location = tuple[int, int]
"""Number of a shard, and number of a document in it."""


class FeatureStore:
    """The shards of ``directory``; several threads may read.

    Raises:
        UserError: a shard or its index is damaged or missing.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.shards: list[Shard] = []
        self._indices: set[Path] = set()
        self._refreshing = threading.Lock()
        self._lookup = np.zeros(0, f"S{KEY_BYTES}"), np.zeros((0, 2), np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Finds shards that were completed since the last call."""
        with self._refreshing:
            indices = [path for path in sorted(self.directory.glob("*.json")) if path.name != MANIFEST_FILE]
            new = [path for path in indices if path not in self._indices]
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
        """The stored tensors of a document, views of the file.

        Raises:
            UserError: its shard is damaged.
        """
        shard, document = location
        return self.shards[shard].document(document)

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def content(self) -> str:
        """A hash of the keys."""
        return xxhash.xxh3_128_hexdigest(self._lookup[0].tobytes())

    def require_complete(self) -> None:
        """Checks that no shards were removed since the directory was sealed.

        Raises:
            UserError: there are fewer documents than the manifest says.
        """
        if len(self) < self.manifest.documents:
            raise UserError(
                f"{self.directory} holds {len(self)} documents and its {MANIFEST_FILE} says {self.manifest.documents}: "
                "shards were removed; restore them, or capture again, which adds what is missing"
            )

    def verify(self) -> int:
        """Compares every document with its checksum; returns the number of bytes read.

        Raises:
            UserError: a shard is damaged, or some are missing.
        """
        self.require_complete()
        for shard in self.shards:
            for number in range(len(shard.entries)):
                shard.document(number)
        return self.nbytes


def require_same_manifest(directory: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of ``directory``, or None if it has none yet.

    Raises:
        UserError: it holds features of another kind than ``manifest``, or other safetensors files.
    """
    if existing := Manifest.read(directory):
        existing.require_same(manifest, directory, ignore=("versions", "documents", "content"))
    elif any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds safetensors files and no manifest.json: expected an empty or new directory")
    return existing


def prepare_directory(directory: Path, manifest: Manifest) -> Manifest:
    """Makes ``directory`` a feature directory like ``manifest``; returns the manifest that it has.

    Raises:
        UserError: see :func:`require_same_manifest`.
    """
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
    """The store of a sealed ``directory``; ``key`` is the configuration key that names it.

    Raises:
        UserError: it holds no features, or shards are damaged or missing.
    """
    manifest = Manifest.read(Path(directory))
    if manifest is None:
        raise UserError(f"{key}: {directory} has no manifest.json; expected the output of recipes/capture_features.py")
    store = FeatureStore(Path(directory), manifest)
    store.require_complete()
    return store


def seal(directory: Path) -> str:
    """Writes the number of documents and their hash into the manifest; returns a summary line.

    Raises:
        UserError: a shard is damaged or missing.
    """
    manifest = Manifest.read(directory)
    assert manifest, "the directory was prepared"
    store = FeatureStore(directory, manifest)
    replace(manifest, documents=len(store), content=store.content).write(directory)
    return (
        f"{directory}: {len(store)} documents in {len(store.shards)} shards, {store.nbytes / GB:.3g} GB "
        f"({manifest.stored})"
    )


def merge(sources: Sequence[str], output: str) -> str:
    """Links the shards of ``sources`` into ``output``, or copies them to another disk; returns a summary line.

    Raises:
        UserError: a source holds no features or others than the first, or a shard is damaged or missing.
    """
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
    """Compares every document of ``directory`` with its checksum; returns a summary line.

    Raises:
        UserError: a shard is damaged or missing.
    """
    store = open_store(directory, "output")
    size = store.verify()
    return f"{directory}: {len(store)} documents, {size / GB:.3g} GB, every checksum is right"
