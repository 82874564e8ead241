"""Limits of the journal of live requests."""

from __future__ import annotations

from typing import Final

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
