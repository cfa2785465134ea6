"""Directories of features: made, opened, put together, checked."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_speculative.targets.cached.manifest import FILE, Manifest
from nemo_speculative.targets.cached.store import Store
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import dir_lock

TRAINING, HELD_OUT = "training.jsonl", "held_out.jsonl"
"""The captured documents themselves."""
GB = 1e9


def require_same_kind(directory: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of ``directory``; None: it has none yet.

    Raises:
        UserError: it holds features of another kind than ``manifest``, or something else.
    """
    if found := Manifest.read(directory):
        found.require_same(manifest, directory, free=("versions", "documents", "content"))
    elif any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds safetensors files and no manifest.json: expected an empty or new directory")
    return found


def prepare(directory: Path, manifest: Manifest) -> Manifest:
    """Makes ``directory`` one of features like ``manifest``; returns the manifest that it has.

    Raises:
        UserError: see :func:`require_same_kind`.
    """
    found = require_same_kind(directory, manifest)
    if found is None:
        manifest.write(directory)
    return found or manifest


def remove_unfinished(directory: Path) -> None:
    """Removes what a writer left that was killed; for who holds ``directory``."""
    for partial in directory.glob("*.partial"):
        if not partial.name.startswith(FILE):  # which other ranks may be writing
            partial.unlink()


def opened(directory: str | Path, key: str) -> Store:
    """The features of ``directory``.

    Raises:
        UserError: it holds none, or shards are damaged or missing.
    """
    manifest = Manifest.read(Path(directory))
    if manifest is None:
        raise UserError(f"{key}: {directory} has no manifest.json; expected the output of recipes/capture_features.py")
    store = Store(Path(directory), manifest)
    store.require_whole()
    return store


def seal(directory: Path) -> str:
    """Writes into the manifest how much there is; says so.

    Raises:
        UserError: a shard is damaged or missing.
    """
    manifest = Manifest.read(directory)
    assert manifest, "the directory was prepared"
    store = Store(directory, manifest)
    replace(manifest, documents=len(store), content=store.content).write(directory)
    size = sum(shard.size for shard in store.shards)
    return f"{directory}: {len(store)} documents in {len(store.shards)} shards, {size / GB:.3g} GB ({manifest.stored})"


def merge(sources: Sequence[str], output: str) -> str:
    """Puts the shards of ``sources`` into ``output``: links, or copies on another disk; says what is there then.

    Raises:
        UserError: one holds no features or others than the first, or a shard is damaged or missing.
    """
    stores = [opened(source, "merge") for source in sources]
    into = Path(output)
    with dir_lock(into, "output"):
        for store in stores:
            prepare(into, store.manifest)
        for store in stores:
            for shard in store.shards:
                for file in (shard.path, shard.path.with_suffix(".json")):  # the index last
                    _place(file, into / file.name)
            for name in (TRAINING, HELD_OUT):
                _append_documents(store.directory / name, into / name)
        return seal(into)


def _place(file: Path, to: Path) -> None:
    if to.exists():  # its name says what is in it
        return
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    partial.rename(to)


def _append_documents(lines: Path, to: Path) -> None:
    there = set(to.open()) if to.exists() else set()
    if lines.exists():
        with lines.open() as new, to.open("a") as out:
            out.writelines(line for line in new if line not in there)


def verify(directory: str) -> str:
    """Compares everything with its checksum; says how much.

    Raises:
        UserError: something is damaged or missing.
    """
    store = opened(directory, "output")
    size = store.verify()
    return f"{directory}: {len(store)} documents, {size / GB:.3g} GB, every checksum is right"
