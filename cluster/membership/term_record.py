"""Decide what one worker grants: at most one term at a time, each higher than the last, and none beside a lease.

A number that was granted is on disk first, so a worker that restarts grants no lower one. Safety rests on that, and on
the engine's fence. Leases only pace who may ask next. Pure: the clock is injected, and the caller writes to disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cluster.core.term_limits import LEASE_S
from cluster.membership.slowness import extra_s
from cluster.membership.terms import NO_TERM, Denial, Process, Term

__all__ = ["TermRecord"]


class TermRecord:
    """What a worker has granted. ``clock`` returns seconds, and counts sleep.

    ``stored`` is the term on disk, None if there is none. After a restart its lease counts as just renewed: nobody
    knows how long it still lasts. A grant is ``begin``, then a write that is synced, then ``finish``.
    """

    def __init__(self, stored: Term | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.term = stored or NO_TERM
        self._lease_ends = clock() + LEASE_S if stored else -math.inf
        self._asked: Term | None = None
        """The term that is being written."""

    def has_lease(self, lag_s: float = 0.0) -> bool:
        """Return whether the lease of the granted term lasts, for others than its coordinator.

        It lasts longer if this machine is late by ``lag_s``: renewals may wait here unread.
        """
        return self._clock() < self._lease_ends + extra_s(lag_s)

    def why_not(self, process: Process, lag_s: float = 0.0) -> Denial | None:
        """Return why a process would not be granted a higher term now; None if it would.

        A restart of the same coordinator waits for the lease of the process before it, whatever the lag.
        """
        if self._asked:
            return Denial.BUSY
        if process == self.term.process:
            return None
        restarted = process.leader == self.term.process.leader
        return Denial.LEASED if self.has_lease(0.0 if restarted else lag_s) else None

    def begin(self, asked: Term, lag_s: float = 0.0) -> Denial | None:
        """Begin to grant a term; return why not, if it cannot be. Until ``finish``, nothing is renewed or granted."""
        if denial := self.why_not(asked.process, lag_s):
            return denial
        if asked != self.term and asked.number <= self.term.number:
            return Denial.OLD
        self._asked = asked
        return None

    def finish(self, *, written: bool) -> Denial | None:
        """Grant the term that ``begin`` began with, if it has been written; else leave everything as it was."""
        asked, self._asked = self._asked, None
        assert asked
        if not written:
            return Denial.NOT_WRITTEN
        self.term = asked
        self._lease_ends = self._clock() + LEASE_S
        return None

    def renew(self, term: Term) -> Denial | None:
        """Extend the lease of the granted term, even if it has ended."""
        if self._asked:
            return Denial.BUSY
        if term != self.term:
            return Denial.OLD
        self._lease_ends = self._clock() + LEASE_S
        return None

    def give_back(self, term: Term) -> None:
        """End the lease of a term. The number stays granted."""
        if term == self.term:
            self._lease_ends = -math.inf
