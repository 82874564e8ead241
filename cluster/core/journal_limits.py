"""Limits of the journal of live requests."""

from __future__ import annotations

from typing import Final

from cluster.core.follow_limits import FOLLOW_S
from cluster.core.limits import MIB

JOURNAL_BYTES: Final = 16 * MIB
"""A journal of this size is rewritten without finished requests. One full of live requests accepts no more."""
JOURNAL_FSYNC_S: Final = 1.0
JOURNAL_BATCHES: Final = 4096
"""Most batches of records that wait for the journal's disk: several seconds of all engine loops."""
JOURNAL_RETRY_S: Final = 5.0
"""Interval of retries after a failed write of the journal."""
JOURNAL_LIVE_S: Final = 10.0
"""Interval at which a journal notes the live requests. RESUME_S counts from the last note."""
PARKED_S: Final = 2 * FOLLOW_S
"""How long a journal keeps an answer without a reader, whose client looks for a coordinator for FOLLOW_S."""
MAX_ENDED: Final = 4096
"""Ended requests that a journal remembers."""
