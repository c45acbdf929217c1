"""Tells a slow store from one whose process or network is gone."""

from __future__ import annotations

import select
import socket
from contextlib import suppress

from torch.distributed import PrefixStore, Store, TCPStore

CONNECT = 2.0  # seconds for a connection
# Linux asks an idle peer after 3 s, then every 3 s. Without 4 answers, after 15 s, it is cut off.
KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}


def addresses(store: Store) -> list[tuple[str, int]] | None:
    """Numeric addresses and port of a store's process, or None if the store is no TCPStore.

    An empty list if no name server answers now.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    try:
        found = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(str(address[0]), int(address[1])) for *_, address in found]


class StoreLine:
    """An idle connection to the store's process.

    Nothing is sent on it. The kernels of both machines keep it, however busy the processes are. It
    breaks if the store's process ends, or if the network does not carry packets any more.
    """

    def __init__(self, addresses: list[tuple[str, int]]) -> None:
        """Connect, to the first address that answers. This takes at most some seconds.

        Args:
            addresses: the store's. Without one, the line counts as cut.
        """
        self._socket: socket.socket | None = None
        for address in addresses:
            with suppress(OSError):
                self._socket = socket.create_connection(address, CONNECT)
                break
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def cut(self) -> bool:
        """Whether the connection is broken. Returns at once."""
        if self._socket is None:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)  # nothing is sent: readable means ended
        return bool(poll.poll(0))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
