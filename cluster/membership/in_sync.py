"""Name the copies of a leader's state from which an answer may be resumed: those that lack nothing that a client saw.

A leader has the set stored at the workers of its rings before it goes on without one of the copies. A new leader reads
it with its grants, so one worker of an earlier ring is enough. This module knows values; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["NOT_NAMED", "InSyncSet"]


@dataclass(frozen=True, slots=True, order=True)
class InSyncSet:
    """The ids of the copies, the leader's own included. Sets are ordered by the leader's term, then by ``version``."""

    term: int = 0
    version: int = 0
    replicas: tuple[str, ...] = ()


NOT_NAMED: Final = InSyncSet()
"""The set of a worker that was never told one."""
