"""Suspicion: silence makes a worker suspect, then gone; a refusal makes it gone at once; a word brings it back.

It knows names, times and sentences. It refuses to know how anybody is asked. Slow is not dead: whatever a worker says,
an answer to a heartbeat or a frame that went through it, starts its silence anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.core.limits import GONE_S, SUSPECT_S
from cluster.membership.slowness import SlowAnswers, extra_s

_REMEMBERED = 8


class Standing(StrEnum):
    """What is believed of a worker."""

    UP = "up"
    SUSPECT = "suspect"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Belief:
    """A worker's standing ``since`` when (the injected clock's seconds), and why, where it is not up."""

    worker: str
    standing: Standing
    since: float
    heard: float
    why: str = ""
    losses: int = 0
    """How often it was found gone."""
    lost_at: tuple[float, ...] = ()
    """When, the last few times."""

    def lost_since(self, when: float) -> int:
        """How often it was found gone since then, as far as that is remembered."""
        return sum(at >= when for at in self.lost_at)

    def lost(self, why: str, now: float) -> Belief:
        """The belief that it is gone."""
        at = (*self.lost_at, now)[-_REMEMBERED:]
        return replace(self, standing=Standing.GONE, since=now, why=why, losses=self.losses + 1, lost_at=at)


class Suspicion:
    """Beliefs about workers by name. Every method is given the time; each returns the beliefs that it changed.

    Time in which nobody looked (this machine slept, or was starved) is held against no worker. One whose machine is
    overloaded is given longer: by the lag that it reports, and by how long its answers took of late.
    """

    def __init__(self, suspect_s: float = SUSPECT_S, gone_s: float = GONE_S) -> None:
        self._suspect_s, self._gone_s = suspect_s, gone_s
        self._beliefs: dict[str, Belief] = {}
        self._looked: float | None = None
        self._answers: dict[str, SlowAnswers] = {}
        self._lags: dict[str, float] = {}

    def __iter__(self) -> Iterator[Belief]:
        return iter(tuple(self._beliefs.values()))

    def of(self, worker: str) -> Belief | None:
        """What is believed; None of one that is not watched."""
        return self._beliefs.get(worker)

    def is_gone(self, worker: str) -> bool:
        belief = self._beliefs.get(worker)
        return belief is not None and belief.standing is Standing.GONE

    def forget(self, worker: str) -> None:
        self._beliefs.pop(worker, None)
        self._answers.pop(worker, None)
        self._lags.pop(worker, None)

    def note_lag(self, worker: str, lag_s: float) -> None:
        """The worker says how late things happen on its machine."""
        if worker in self._beliefs:
            self._lags[worker] = lag_s

    def worst_lag(self) -> float:
        """The longest lag that a worker which is not gone has reported, in seconds."""
        return max((lag for worker, lag in tuple(self._lags.items()) if not self.is_gone(worker)), default=0.0)

    def granted(self, worker: str, now: float) -> float:
        """Return the silence in seconds after which the worker counts as gone, this machine's own lag apart."""
        answers = self._answers.get(worker)
        return (answers.granted(now) if answers else self._gone_s) + extra_s(self._lags.get(worker, 0.0))

    def on_heard(self, worker: str, now: float) -> tuple[Belief, ...]:
        """The worker said something; one that is not watched yet is from now on."""
        known = self._beliefs.get(worker)
        if known:
            self._answers.setdefault(worker, SlowAnswers(self._gone_s)).add(now - known.heard, now)
        if known is None or known.standing is not Standing.UP:
            known = known or Belief(worker, Standing.UP, now, now)
            return self._believe(replace(known, standing=Standing.UP, since=now, heard=now, why=""))
        self._beliefs[worker] = replace(known, heard=max(known.heard, now))
        return ()

    def on_refusal(self, worker: str, why: str, now: float) -> tuple[Belief, ...]:
        """Somebody who must know says that the worker is not there: its port is closed, its engine has ended."""
        known = self._beliefs.get(worker)
        if known and known.standing is Standing.GONE:
            self._beliefs[worker] = replace(known, why=why)
            return ()
        return self._believe((known or Belief(worker, Standing.UP, now, now)).lost(why, now))

    def look(self, now: float, lag_s: float = 0.0) -> tuple[Belief, ...]:
        """The time has come to judge silence. ``lag_s``: how late things happen on this machine."""
        self._excuse(now)
        return tuple(b for known in tuple(self._beliefs.values()) for b in self._judge(known, now, extra_s(lag_s)))

    def _excuse(self, now: float) -> None:
        """Hold the time in which nobody looked against no one."""
        missed = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        if missed > self._suspect_s:
            for name, b in self._beliefs.items():
                self._beliefs[name] = replace(b, heard=min(now, b.heard + missed))

    def _judge(self, known: Belief, now: float, more_s: float) -> tuple[Belief, ...]:
        silence = now - known.heard
        if known.standing is not Standing.GONE and silence >= self.granted(known.worker, now) + more_s:
            why = f"has not been heard for {silence:.1f} s"
            return self._believe(known.lost(why, now))
        if known.standing is Standing.UP and silence >= self._suspect_s + more_s:
            why = f"is late: nothing heard for {silence:.1f} s"
            return self._believe(replace(known, standing=Standing.SUSPECT, since=now, why=why))
        return ()

    def _believe(self, belief: Belief) -> tuple[Belief, ...]:
        self._beliefs[belief.worker] = belief
        return (belief,)
