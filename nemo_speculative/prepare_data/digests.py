"""A set of digests that stays small: 16 to 32 bytes each, where Python's own takes a hundred."""

import hashlib
from array import array

BYTES = 8
"""Among 10 million rows two that differ have the same digest with a probability of 3e-6."""
FIRST_SLOTS = 1 << 10


def digest(text: str, person: bytes = b"") -> int:
    """A number from 1 to 2^64 - 1; ``person`` keeps different kinds of text apart."""
    hashed = hashlib.blake2b(text.encode(errors="replace"), digest_size=BYTES, person=person)
    return int.from_bytes(hashed.digest(), "big") or 1


class Digests:
    """Open addressing with linear probing, at most half full; 0 marks a free slot."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(BYTES * FIRST_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._slot(value)] == value

    def add(self, value: int) -> None:
        slot = self._slot(value)
        if self._slots[slot] == value:
            return
        self._slots[slot] = value
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._double()

    def _slot(self, value: int) -> int:
        """Where ``value`` is, or belongs."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & mask
        return slot

    def _double(self) -> None:
        before, self._slots = self._slots, array("Q", bytes(2 * BYTES * len(self._slots)))
        for value in before:
            if value:
                self._slots[self._slot(value)] = value
