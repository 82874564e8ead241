"""Limits of groups of workers that share the layers of a stage. Durations are in seconds."""

from __future__ import annotations

from typing import Final

MAX_RANKS: Final = 8
"""Workers of a group. Models have 8 heads of keys or fewer, and each further rank makes every sum slower."""
GROUP_GATHER_S: Final = 60.0
"""A worker waits so long for the addresses of its group: until the slowest one has started an engine."""
GROUP_JOIN_S: Final = 10.0
"""An engine that has not found the others of its group in this time is killed: MLX waits for them for ever. All have
started by then, so it takes a tenth of a second; while it lasts, an engine answers nothing."""
DEVICES_JOIN_S: Final = 30.0
"""The same where meeting sets up GPUs or RDMA devices, too."""
GROUP_BEGIN_S: Final = 2.0
"""A rank is waited for so long until it begins to meet the others; after that, they begin without it."""
GROUP_LISTEN_S: Final = 0.1
"""The last rank begins to meet the others so long after all of them did. It connects first, and MLX tries a connection
again only after 1, 2, 4 and 8 s."""
SUMS_S: Final = 15.0
"""Time for the ranks of a group to measure their sums: a second on most links, ten on a slow one."""
SUMS_KEPT_S: Final = 24 * 3600.0
"""A group that was measured within a day is not measured again before a load."""
KEPT_SUMS: Final = 16
"""Groups whose measured sums a worker keeps."""
MAX_GROUP_KEY_CHARS: Final = 1024
"""What names a group where its sums are kept: the backend, id and host of each rank's worker."""
MAX_HOST_CHARS: Final = 64
"""An IP address with a port."""
