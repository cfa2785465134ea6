"""The size of features before they are computed."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch

from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.cached.documents import StoredPositions, document_key
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest
from nemo_speculative.targets.cached.store import GB, FeatureStore
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

OVERHEAD = 0.01
"""Size of indices and of the file system's own data, relative to the features."""


@dataclass
class Budget:
    """The documents that a store lacks, without duplicates, and their size."""

    manifest: Manifest
    missing: dict[bytes, int] = field(default_factory=dict)
    """Position of each missing document in the sequence of all documents, by its key."""
    lengths: list[int] = field(default_factory=list)
    """Number of tokens of each missing document."""
    first: str = ""
    """Id of the first missing document."""
    present: int = 0
    """Number of documents that are stored already."""
    positions: dict[str, int] = field(default_factory=lambda: {AUX: 0, LAST_HIDDEN: 0})
    """Number of positions to store, by kind."""

    @classmethod
    def of(cls, store: FeatureStore, *parts: Sequence[TokenRow]) -> "Budget":
        """The budget for the documents of ``parts``, end to end, that ``store`` lacks."""
        budget, keys = cls(store.manifest), set[bytes]()
        progress = Progress("looking up features", sum(map(len, parts)), quiet=True)
        for number, row in enumerate(chain(*parts)):
            progress.advance()
            key = document_key(row.input_ids, row.loss_mask)
            if key in keys:
                continue
            keys.add(key)
            if store.find([key])[0] is not None:
                budget.present += 1
                continue
            budget.first = budget.first or row.id
            budget.missing[key] = number
            budget.lengths.append(len(row.input_ids))
            stored = StoredPositions.of(torch.tensor(row.loss_mask, dtype=torch.bool), store.manifest)
            budget.positions[AUX] += stored.num_aux
            budget.positions[LAST_HIDDEN] += len(stored.last_hidden)
        progress.close()
        return budget

    @property
    def tokens(self) -> int:
        """Number of tokens of the missing documents."""
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Size of the missing features."""
        per_position = self.manifest.bytes_per_position
        return sum(count * per_position.get(kind, 0) for kind, count in self.positions.items())

    def report(self, directory: Path) -> str:
        """One line: documents, bytes per token, total size, and free space."""
        if not self.missing:
            return f"features: all {self.present} documents are in {directory}; nothing is missing"
        per_position, tokens = self.manifest.bytes_per_position, max(self.tokens, 1)
        kinds = ", ".join(
            f"{kind} at {self.positions[kind] / tokens:.0%} ({nbytes} B)" for kind, nbytes in per_position.items()
        )
        present = f" ({self.present} more are present)" if self.present else ""
        return (
            f"features: {len(self.missing)} documents{present}, {self.tokens} tokens, {kinds}, as "
            f"{self.manifest.stored}: {self.nbytes / tokens:.0f} bytes a token, {self.nbytes / GB:.3g} GB in all; "
            f"{free_bytes(directory) / GB:.3g} GB free in {directory}"
        )

    def require_room(self, directory: Path, key: str) -> None:
        """Checks that the disk of ``directory``, which the configuration key ``key`` names, has room.

        Raises:
            UserError: it has less than is needed.
        """
        needed, free = self.nbytes * (1 + OVERHEAD), free_bytes(directory)
        if needed > free:
            fp8 = replace(self, manifest=replace(self.manifest, stored="fp8")).nbytes
            raise UserError(
                f"{key}: the features take {needed / GB:.3g} GB and {directory} has {free / GB:.3g} GB free; make "
                f"room, choose another disk, capture fewer conversations, or dtype=fp8 ({fp8 / GB:.3g} GB)"
            )


def free_bytes(directory: Path) -> int:
    """Free space of the disk on which ``directory``, which need not exist yet, would be."""
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free
