"""What features will take, before any are computed."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.targets.cached.codecs import CODECS
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest
from nemo_speculative.targets.cached.positions import Positions, key_of_lists
from nemo_speculative.targets.cached.store import Store
from nemo_speculative.targets.cached.writer import stored_hidden
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

GB = 1e9
RESERVE = 0.01
"""Of the features: indices, and what a file system takes beside the data."""


@dataclass
class Budget:
    """Documents that are to be captured, without repetition, and their size."""

    manifest: Manifest
    missing: dict[bytes, int]
    """By their keys: which of the documents that were counted."""
    lengths: list[int]
    """Their tokens."""
    first: str
    """The name of the first of them."""
    present: int
    """Documents that are there already."""
    positions: dict[str, int]
    """Of each kind that is stored, how many."""

    @classmethod
    def of(cls, store: Store, *parts: Sequence[TokenRow]) -> "Budget":
        """Of the documents that ``store`` lacks, of ``parts`` end to end."""
        found, seen = cls(store.manifest, {}, [], "", 0, {AUX: 0, LAST_HIDDEN: 0}), set[bytes]()
        progress = Progress("looking up features", sum(map(len, parts)), quiet=True)
        for number, row in enumerate(chain(*parts)):
            progress.advance()
            key = key_of_lists(row.input_ids, row.loss_mask)
            if key in seen:
                continue
            seen.add(key)
            if store.find([key])[0] is None:
                found._add(key, number, row)
            else:
                found.present += 1
        progress.close()
        return found

    def _add(self, key: bytes, number: int, row: TokenRow) -> None:
        self.first = self.first or row.id
        self.missing[key] = number
        self.lengths.append(len(row.input_ids))
        needed = Positions.of(torch.tensor(row.loss_mask, dtype=torch.bool), self.manifest.convention)
        self.positions[AUX] += needed.attended
        self.positions[LAST_HIDDEN] += len(stored_hidden(needed, self.manifest))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Of all that is missing."""
        each = self.manifest.position_bytes
        return sum(count * each.get(kind, 0) for kind, count in self.positions.items())

    def report(self, directory: Path) -> str:
        """One line: documents, bytes a token, the total, and what is free."""
        if not self.missing:
            return f"features: all {self.present} documents are in {directory}; nothing is missing"
        each, tokens = self.manifest.position_bytes, max(self.tokens, 1)
        kinds = ", ".join(f"{kind} at {self.positions[kind] / tokens:.0%} ({each[kind]} B)" for kind in each)
        there = f" ({self.present} more are there)" if self.present else ""
        return (
            f"features: {len(self.missing)} documents{there}, {self.tokens} tokens, {kinds}, as "
            f"{self.manifest.stored}: {self.nbytes / tokens:.0f} bytes a token, {self.nbytes / GB:.3g} GB in all; "
            f"{free(directory) / GB:.3g} GB free in {directory}"
        )

    def require_room(self, directory: Path, key: str) -> None:
        """
        Raises:
            UserError: the disk of ``directory``, which ``key`` names, has less than is needed.
        """
        needed, there = self.nbytes * (1 + RESERVE), free(directory)
        if needed > there:
            smaller = replace(self, manifest=replace(self.manifest, stored=CODECS["fp8"].name)).nbytes
            raise UserError(
                f"{key}: the features take {needed / GB:.3g} GB and {directory} has {there / GB:.3g} GB free; make "
                f"room, choose another disk, capture fewer conversations, or dtype=fp8 ({smaller / GB:.3g} GB)"
            )


def free(directory: Path) -> int:
    """Bytes of the disk that ``directory``, which need not exist yet, would be on."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
