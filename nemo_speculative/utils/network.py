"""Addresses of this machine to listen on."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_speculative.utils.errors import UserError

LOOPBACK = "lo"
COLLECTIVES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables of the interface on which torch's collectives listen and connect."""
FRESH_STORE = "NEMO_FRESH_STORE"
"""Environment variable of workers whose launcher gives them an empty store at every start; torchrun does not."""
SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address, which it writes behind 20 bytes."""


@contextmanager
def bound(host: str, port: int, given_as: str, refusal: type[UserError] = UserError) -> Iterator[socket.socket]:
    """A socket of that address that nobody can connect to yet; ``given_as`` is what the user calls it.

    Raises:
        UserError: the port is busy, or the host is not one of this machine's; of the class ``refusal``.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # As servers do it: a port that is only cooling down after a close is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise refusal(f"{given_as}: cannot listen there ({error.strerror}); choose another port") from None
    with listener:
        yield listener


def free_port() -> int:
    """One of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def address_of(interface: str, given_as: str) -> str:
    """The IPv4 address of a network interface; ``given_as`` is what the user calls it.

    Raises:
        UserError: this machine has no such interface, or that has no such address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"{given_as} {interface}: no interface of this machine with an IPv4 address; expected one of {there}"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def collect_on(interface: str) -> None:
    """Has collectives of this process and its children listen on ``interface``, where the environment names none."""
    for variable in COLLECTIVES:
        os.environ.setdefault(variable, interface)
