"""Addresses of this machine to listen on."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_speculative.errors import UserError


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
