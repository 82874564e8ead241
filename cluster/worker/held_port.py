"""A port that an engine keeps for the other ranks of its group until MLX listens on it.

MLX's ring listens with SO_REUSEPORT, and would silently share a port with another program that does so too. Connections
of the group would then reach the wrong one. Where ranks meet for NVIDIA's library, rank 0 listens with SO_REUSEADDR. A
port that is held is open to both ways, and is given to nobody else.
"""

from __future__ import annotations

import socket

from cluster.core.errors import PortInUse


class HeldPort:
    """A port of this machine's address ``host``, held until ``close``."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Without them, MLX could not listen here. Not listening itself, the socket takes no connections away.
            # The second is set once the port is chosen, so that the system chooses one that nobody has.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind((host, 0))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError as e:
            self._socket.close()
            raise PortInUse(f"cannot hold a port on {host} for a group: {e.strerror}") from e

    @property
    def number(self) -> int:
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._socket.close()
