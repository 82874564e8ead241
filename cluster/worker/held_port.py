"""A port that an engine keeps for the other ranks of its group until MLX listens on it.

MLX's ring listens with SO_REUSEPORT, and would silently share a port with another program that does so too. Connections
of the group would then reach the wrong one. Where ranks meet for NVIDIA's library, rank 0 listens with SO_REUSEADDR. A
port that is held is open to both ways, and is given to nobody else.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from typing import Final

from cluster.core.errors import PortInUse

ATTEMPTS: Final = 8
"""How many ports are tried, of which another program may have one on a further address."""


class HeldPort:
    """A port of this machine's address ``host``, and of its addresses ``others``, held until ``close``."""

    def __init__(self, host: str, others: Iterable[str] = ()) -> None:
        for _ in range(ATTEMPTS):
            self._sockets = [_bind(host, 0)]
            if all(self._hold(other) for other in others):
                return
            self.close()
        raise PortInUse(f"no port is free on all of {', '.join((host, *others))} for a group")

    def _hold(self, host: str) -> bool:
        """Hold the port on a further address. Return whether it was free there; an address that is gone needs none."""
        try:
            self._sockets.append(_bind(host, self.number))
        except PortInUse as e:
            return not isinstance(e.__cause__, OSError) or e.__cause__.errno != errno.EADDRINUSE
        return True

    @property
    def number(self) -> int:
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def _bind(host: str, number: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Without them, MLX could not listen here. Not listening itself, the socket takes no connections away.
        # The second is set once the port is chosen, so that the system chooses one that nobody has.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, number))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as e:
        bound.close()
        raise PortInUse(f"cannot hold a port on {host} for a group: {e.strerror}") from e
    return bound
