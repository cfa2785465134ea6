"""Sockets, ports and interfaces of this machine."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_speculative.utils.errors import UserError

LOOPBACK = "lo"
FRESH_STORE = "NEMO_FRESH_STORE"
"""Environment variable of workers whose launcher gives them an empty store at every start, unlike torchrun."""
SIOCGIFADDR = 0x8915
"""The ioctl of Linux for an interface's IPv4 address, which it writes after 20 bytes."""


@contextmanager
def bind_socket(
    host: str, port: int, given_as: str, error_class: type[UserError] = UserError
) -> Iterator[socket.socket]:
    """Yields a socket that is bound to the address but does not listen yet.

    Raises:
        error_class: the port is busy, or the host is not an address of this machine, which the user named ``given_as``.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # As servers do: a port in TIME_WAIT after a close counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise error_class(f"{given_as}: cannot listen there ({error.strerror}); choose another port") from None
    with listener:
        yield listener


def free_port() -> int:
    """A port of 127.0.0.1 on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ipv4_address(interface: str, given_as: str) -> str:
    """The IPv4 address of a network interface, which the user named ``given_as``; raises UserError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"{given_as} {interface}: no interface of this machine with an IPv4 address; expected one of {known}"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def bind_collectives_to(interface: str) -> None:
    """Has this process and its children use ``interface`` for collectives, unless the environment names another."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)
