"""Limits of clients that follow a service from one coordinator to another."""

from __future__ import annotations

from typing import Final

FOLLOW_S: Final = 60.0
"""How long a client looks for the coordinator that goes on with its answer."""
FOLLOW_PAUSE_S: Final = 0.1
"""Pause after no address of a client had the leader; it doubles each time."""
MAX_FOLLOW_PAUSE_S: Final = 0.5
FOLLOW_CONNECT_MS: Final = 2_000
"""Timeout of one connection attempt of a client that has other addresses to try."""
FOLLOW_PING_MS: Final = 3_000
"""After this silence such a client gives up a connection. A network may lose a few packets; a Mac that sleeps is silent
for longer."""
MAX_COORDINATORS: Final = 16
"""Addresses of coordinators that one client is given."""
PASS_WAIT_S: Final = 10.0
"""How long a standby holds a new request while nobody leads."""
