"""The documents of a directory, found by their content."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from nemo_speculative.targets.cached.manifest import FILE, Manifest
from nemo_speculative.targets.cached.positions import KEY_BYTES
from nemo_speculative.targets.cached.shards import Shard, Tensors
from nemo_speculative.utils.errors import UserError

KEYS = np.dtype(f"S{KEY_BYTES}")
Place = tuple[int, int]
"""Which shard, and which document of it."""


class Store:
    """The shards of ``directory``; several threads may read.

    Raises:
        UserError: a shard or its index is damaged or missing.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.shards: list[Shard] = []
        self._known: set[Path] = set()
        self._reading = threading.Lock()
        self._index = np.zeros(0, KEYS), np.zeros((0, 2), np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Finds the shards that were finished since the last look."""
        with self._reading:
            new = [p for p in sorted(self.directory.glob("*.json")) if p.name != FILE and p not in self._known]
            if not new:
                return
            self.shards += [Shard(index, self.manifest) for index in new]
            self._known |= set(new)
            keys = np.concatenate([shard.entries["key"] for shard in self.shards])
            places = np.array([(s, d) for s, shard in enumerate(self.shards) for d in range(len(shard.entries))])
            # A document may lie in two shards after a merge, or where two ranks met it: the first one counts.
            known, first = np.unique(keys, return_index=True)
            self._index = known, places.reshape(-1, 2)[first]

    def __len__(self) -> int:
        return len(self._index[0])

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Where each document is; None: nowhere here."""
        known, places = self._index
        if not len(known) or not keys:
            return [None] * len(keys)
        wanted = np.array(keys, dtype=KEYS)
        at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        there = (known[at] == wanted).tolist()
        return [tuple(place) if found else None for place, found in zip(places[at].tolist(), there, strict=True)]

    def tensors(self, place: Place) -> Tensors:
        """What is stored of a document; views of the file.

        Raises:
            UserError: its shard is damaged.
        """
        shard, document = place
        return self.shards[shard].document(document)

    @property
    def content(self) -> str:
        """A hash of the keys."""
        return xxhash.xxh3_128_hexdigest(self._index[0].tobytes())

    def require_whole(self) -> None:
        """
        Raises:
            UserError: there are fewer documents than the last writer left.
        """
        if len(self) < self.manifest.documents:
            raise UserError(
                f"{self.directory} holds {len(self)} documents and its {FILE} says {self.manifest.documents}: shards "
                "were removed; put them back, or capture again, which adds what is missing"
            )

    def verify(self) -> int:
        """Compares every document with its checksum; returns the bytes read.

        Raises:
            UserError: a shard is damaged, or some are missing.
        """
        self.require_whole()
        for shard in self.shards:
            for number in range(len(shard.entries)):
                shard.document(number)
        return sum(shard.size for shard in self.shards)
