"""The sockets that the gateway listens on."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

from gateway.config import Listen

NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a machine without IPv6, say


class CannotStart(Exception):
    """Says what the gateway lacks, with its key."""


def listening(listen: Listen) -> list[socket.socket]:
    """Bound to the address; where there are several workers, each may have its own. Raises `CannotStart`."""
    where = f"listen.port: cannot listen on {listen.host}:{listen.port}"
    try:
        found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets = [_bound(listen, family, address) for family, *_, address in dict.fromkeys(found)]
    except OSError as error:
        raise CannotStart(f"{where}: {error.strerror}") from error
    bound = [each for each in sockets if each is not None]
    if not bound:
        raise CannotStart(f"{where}: this machine has no such address")
    return bound


def _bound(listen: Listen, family: int, address: Any) -> socket.socket | None:
    """None when the machine has no such address. Raises `OSError`."""
    with contextlib.ExitStack() as undo:
        try:
            bound = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listen.workers > 1:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(address)
        except OSError as error:
            if error.errno in NO_SUCH_ADDRESS:
                return None
            raise
        undo.pop_all()
        return bound
