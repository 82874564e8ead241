"""Limits of a leader's standbys, and of what they store. Durations are in seconds."""

from __future__ import annotations

from typing import Final

from cluster.core.journal_limits import JOURNAL_BYTES
from cluster.core.limits import MIB

MAX_STANDBYS: Final = 8
"""Most standbys that follow one leader."""
MAX_COPIES: Final = MAX_STANDBYS + 1
"""Most copies of a leader's state that are in sync: its own, and one of each standby."""
STORE_S: Final = 2.0
"""A standby that does not store an update within this time is not in sync any more."""
IN_SYNC_WAIT_S: Final = 20.0
"""How long a standby whose copy lacks something leaves the lead to one whose copy lacks nothing, if that comes back."""
CONFIRM_S: Final = 5.0
"""How long a command waits for the standbys to store what it edited: one that takes longer is not in sync by then."""
PREPARED_S: Final = 5.0
"""How long ``macpipe handover`` waits for a standby to read what it needs to lead: answers pause for that otherwise."""
STOP_PREPARED_S: Final = 1.0
"""How long a leader that is told to stop waits for that; less than silence that lets standbys take it for lost."""
PIECE_BYTES: Final = MIB
"""Size of the pieces in which a whole journal is sent."""
MAX_UNSTORED_BYTES: Final = 4 * JOURNAL_BYTES
"""A standby with more updates than this that it has not stored is disconnected, and starts from a new copy."""
