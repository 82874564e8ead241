"""Limits of terms: how long a worker belongs to a coordinator that has fallen silent. Durations are in seconds."""

from __future__ import annotations

from typing import Final

LEASE_S: Final = 2.0
"""After each heartbeat, a worker grants no other coordinator a term for this long. It paces, and is not for safety."""
LEASE_MARGIN_S: Final = 0.2
"""A leader's count of a lease ends so much earlier than its worker's: enough for clocks whose speeds differ by 5 %."""
ASK_AGAIN_S: Final = 0.1
"""About how often a new candidate asks workers again, for two leases: one of a lost leader ends within that time."""
MAX_BACK_OFF: Final = 8.0
"""The longest random wait between two tries to become the leader, in leases."""
RELEASE_S: Final = 3 * LEASE_S
"""A worker that leaves waits so long for a silent coordinator to move its layers away."""
FENCE_S: Final = 15.0
"""An engine that does not stop computing for an earlier term in this time is killed: as long as a frame may take."""
MAX_TERM: Final = 2**40
"""The largest number of a term. Numbers grow by one with each new leader, so a larger one is no honest worker's."""
GRANT_TRIES: Final = 3
"""How often a coordinator takes a higher term before a load, if workers have granted others meanwhile."""
