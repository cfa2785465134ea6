"""Where processes listen: what Linux says of their TCP sockets."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

LISTENING = "0A"


def with_descendants(process: int) -> Iterator[int]:
    """``process`` and all that it started, as far as they are still there."""
    yield process
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from with_descendants(int(child))


def listening(process: int) -> set[tuple[int, str]]:
    """(process, IP address) of every socket on which ``process`` or what it started listens now."""
    sockets = dict(_sockets(process))
    return {(sockets[inode], address) for inode, address in _listeners() if inode in sockets}


def _sockets(process: int) -> Iterator[tuple[str, int]]:
    for one in with_descendants(process):
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{one}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(descriptor.readlink())
                    if target.startswith("socket:["):
                        yield target.removeprefix("socket:[").removesuffix("]"), one


def _listeners() -> Iterator[tuple[str, str]]:
    """Inode and IP address."""
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING:
                yield inode, socket.inet_ntop(family, _address(local.split(":")[0]))


def _address(text: str) -> bytes:
    """The kernel writes an address as 32-bit numbers of this machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return struct.pack(f"={len(words)}I", *words)
