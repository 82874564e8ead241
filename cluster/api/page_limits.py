"""Bounds on what pages in browsers may hold, watch and ask for, each with its reason."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB

FEED_S: Final = 1.0
"""Interval of the snapshots that all pages share."""
MAX_VIEWERS: Final = 256
"""Pages that watch a cluster at once. Each is sent up to 100 KiB a second."""
FEED_REQUESTS: Final = 64
"""Live requests in a snapshot for pages; nobody reads a longer list."""
MAX_LAYERS_CHARS: Final = 1024
"""Characters of a plan's layer ranges; 64 stages of a large model have 500."""
MAX_LOGIN_BYTES: Final = 4 * KIB
"""Bytes of a sign-in, which is read from anyone; one has 80."""
SESSION_S: Final = 12 * 3600.0
"""How long a browser stays signed in: a working day, so that yesterday's cookie is worth nothing."""
SESSIONS_OF_KEY: Final = 64
"""Sessions of one API key; a further sign-in ends its oldest one. A team may share a key."""
MAX_SESSIONS: Final = 4096
"""Sessions of all keys, less than 2 MiB; a further sign-in ends the oldest one."""
