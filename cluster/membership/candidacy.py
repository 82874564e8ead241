"""Become the leader of workers that can hold a model: ask first, then take a full ring, or give everything back.

A candidate that reaches too few workers, or whose leader is alive, changes nothing anywhere. Pure: calls to send are
returned, answers are handed in, clock and randomness are injected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum

from cluster.core.limits import HEARTBEAT_S
from cluster.core.term_limits import ASK_AGAIN_S, LEASE_S, MAX_BACK_OFF
from cluster.membership.in_sync import NOT_NAMED
from cluster.membership.leadership import Fits, Leadership
from cluster.membership.terms import NO_TERM, Process, Term, TermAnswer, TermCall, TermRequest

__all__ = ["CandidatePhase", "LeaderCandidate"]


class CandidatePhase(StrEnum):
    """What a candidate does: nothing until its next turn, asking, gathering grants, or leading."""

    WAITING = "waiting"
    ASKING = "asking"
    GATHERING = "gathering"
    LEADING = "leading"


class LeaderCandidate:
    """One process that wants to lead ``workers``. Call ``step`` whenever time has passed, at least each heartbeat.

    It asks most often in the beginning, since a lost leader's leases end then. ``draw`` returns a random number from 0
    to 1.
    """

    def __init__(
        self,
        process: Process,
        workers: Collection[str],
        fits: Fits,
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._process, self._fits, self._clock, self._draw = process, fits, clock, draw
        self.workers = frozenset(workers)
        self.phase = CandidatePhase.ASKING
        self.leadership: Leadership | None = None
        self.denials: dict[str, TermAnswer] = {}
        """The last refusals, by worker, of the present round or of the one before."""
        self.in_sync = NOT_NAMED
        """The latest set that a worker named with a grant of the present term, or of the last one."""
        self.newest_epoch = 0
        """The largest number of an epoch that any worker named with its grant."""
        self._term = NO_TERM
        self._seen = 0
        """The highest number that any worker has granted, or that this process has asked for.

        A number is not asked for twice: what the first try gave back may arrive after the grant of the second.
        """
        self._began = self._until = clock()
        """When the present phase ends."""
        self._tries = 0
        self._willing: set[str] = set()
        self._granted: dict[str, float] = {}

    def step(self) -> list[TermCall]:
        """Return the calls that are due now."""
        now = self._clock()
        if self.leadership:
            calls = self.leadership.step(self.workers)
            if not self.leadership.ended:
                return calls
            self.leadership = None
            return self._ask(now)
        if now < self._until:
            return []
        return self._give_back(now) if self.phase is CandidatePhase.GATHERING else self._ask(now)

    def on_answer(self, answer: TermAnswer) -> list[TermCall]:
        """Take a worker's answer, however late, and return the calls that follow from it."""
        call, now = answer.call, self._clock()
        self._seen = max(self._seen, answer.granted.number)
        if answer.denial:
            self.denials[call.worker] = answer
        if self.leadership and call.term == self.leadership.term:
            return self.leadership.on_answer(answer)
        if call.request is TermRequest.ASK:
            return self._on_willing(call.worker, now) if answer.denial is None else []
        if call.request is TermRequest.GRANT and call.term == self._term and self.phase is CandidatePhase.GATHERING:
            return self._on_grant(answer, now)
        if call.request is TermRequest.GRANT and answer.denial is None:
            return [TermCall(TermRequest.RETURN, call.worker, call.term, now)]  # it came too late
        return []

    def see(self, term: Term) -> list[TermCall]:
        """Take note that another coordinator of this cluster leads by ``term``. Return the calls that follow.

        A higher term ends this leadership; a candidate gives way to any. The caller must have authenticated the other
        coordinator. A number that a worker names is no proof: perhaps somebody only tried.
        """
        self._seen = max(self._seen, term.number)
        now, calls = self._clock(), list[TermCall]()
        if self.leadership:
            if term <= self.leadership.term:
                return []
            calls = self.leadership.step_down()
            self.leadership = None
        elif self.phase is CandidatePhase.GATHERING:
            calls = self._give_back(now)
        self._tries = 0
        self._wait(now)
        return calls

    def _ask(self, now: float) -> list[TermCall]:
        pace_s = ASK_AGAIN_S if now - self._began < 2 * LEASE_S else HEARTBEAT_S
        self.phase, self._until = CandidatePhase.ASKING, now + pace_s * (0.5 + self._draw())
        self._willing.clear()
        return [TermCall(TermRequest.ASK, worker, Term(0, self._process), now) for worker in sorted(self.workers)]

    def _on_willing(self, worker: str, now: float) -> list[TermCall]:
        """Take the turn once those that would grant a term form a full ring; more may join afterwards."""
        self._willing.add(worker)
        if self.phase is CandidatePhase.GATHERING:
            return [TermCall(TermRequest.GRANT, worker, self._term, now)]
        if self.phase is not CandidatePhase.ASKING or not self._fits(frozenset(self._willing)):
            return []
        self.phase, self._until = CandidatePhase.GATHERING, now + LEASE_S
        self._seen += 1
        self._term = Term(self._seen, self._process)
        self._granted.clear()
        self.in_sync = NOT_NAMED
        self.denials.clear()
        return [TermCall(TermRequest.GRANT, willing, self._term, now) for willing in sorted(self._willing)]

    def _on_grant(self, answer: TermAnswer, now: float) -> list[TermCall]:
        worker = answer.call.worker
        if answer.denial:
            self._willing.discard(worker)
            return [] if self._fits(frozenset(self._willing)) else self._give_back(now)
        self._granted[worker] = answer.call.sent_at
        self.in_sync = max(self.in_sync, answer.in_sync)
        self.newest_epoch = max(self.newest_epoch, answer.newest_epoch)
        if self._fits(frozenset(self._granted)):
            self.phase, self._tries = CandidatePhase.LEADING, 0
            self.leadership = Leadership(self._term, self._granted, self._fits, self._clock)
        return []

    def _give_back(self, now: float) -> list[TermCall]:
        """Give back what was granted, and what may have been without an answer; try again after a random time."""
        calls = [TermCall(TermRequest.RETURN, worker, self._term, now) for worker in sorted(self._willing)]
        self._tries += 1
        self._wait(now)
        return calls

    def _wait(self, now: float) -> None:
        most_s = LEASE_S * min(2.0**self._tries, MAX_BACK_OFF)
        self.phase, self._until = CandidatePhase.WAITING, now + most_s * (0.5 + 0.5 * self._draw())
        self._term = NO_TERM
