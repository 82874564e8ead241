"""Tracks which workers are up, suspect or gone.

Silence makes a worker suspect, then gone. A refusal makes it gone at once. Any sign of life brings it back: an answer
to a heartbeat, or a frame that passed through it. Slow is not dead. This module knows names, times and reasons; it
refuses to know how workers are reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.core.limits import GONE_S, SUSPECT_S
from cluster.membership.slowness import SlowAnswers, extra_s

_REMEMBERED = 8
"""Losses of a worker whose times are kept."""


class Standing(StrEnum):
    """The believed state of a worker."""

    UP = "up"
    SUSPECT = "suspect"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Belief:
    """What is believed of one worker.

    ``since``: when its standing changed. ``heard``: when it was last heard. Both are seconds of the injected clock.
    ``why``: the reason, if it is not up; it continues a sentence that begins with the worker's name.
    """

    worker: str
    standing: Standing
    since: float
    heard: float
    why: str = ""
    losses: int = 0
    """How often it was found gone."""
    lost_at: tuple[float, ...] = ()
    """The times of the last few losses."""

    def lost_since(self, when: float) -> int:
        """Return how often it was found gone since ``when``, among the losses in ``lost_at``."""
        return sum(at >= when for at in self.lost_at)

    def as_gone(self, why: str, now: float) -> Belief:
        """Return the belief that it is gone since ``now``."""
        at = (*self.lost_at, now)[-_REMEMBERED:]
        return replace(self, standing=Standing.GONE, since=now, why=why, losses=self.losses + 1, lost_at=at)


class Suspicion:
    """Beliefs about workers by name. Event methods take the time and return the beliefs that they changed.

    A gap between calls of ``judge_silence`` longer than ``suspect_s`` counts against no worker: this machine slept, or
    was starved of CPU. A worker on an overloaded machine may be silent for longer, according to the lag that it reports
    and to its recent slow answers.
    """

    def __init__(self, suspect_s: float = SUSPECT_S, gone_s: float = GONE_S) -> None:
        self._suspect_s, self._gone_s = suspect_s, gone_s
        self._beliefs: dict[str, Belief] = {}
        self._judged_at: float | None = None
        self._answers: dict[str, SlowAnswers] = {}
        self._lags: dict[str, float] = {}

    def __iter__(self) -> Iterator[Belief]:
        return iter(tuple(self._beliefs.values()))

    def of(self, worker: str) -> Belief | None:
        """Return what is believed of a worker, or None if it is not watched."""
        return self._beliefs.get(worker)

    def is_gone(self, worker: str) -> bool:
        belief = self._beliefs.get(worker)
        return belief is not None and belief.standing is Standing.GONE

    def forget(self, worker: str) -> None:
        self._beliefs.pop(worker, None)
        self._answers.pop(worker, None)
        self._lags.pop(worker, None)

    def note_lag(self, worker: str, lag_s: float) -> None:
        """Record the lag that a worker reports: how late events happen on its machine, in seconds."""
        if worker in self._beliefs:
            self._lags[worker] = lag_s

    def worst_lag(self) -> float:
        """Return the longest lag, in seconds, reported by a worker that is not gone."""
        return max((lag for worker, lag in tuple(self._lags.items()) if not self.is_gone(worker)), default=0.0)

    def allowed_silence_s(self, worker: str, now: float) -> float:
        """Return the seconds of silence after which the worker counts as gone. The caller adds this machine's lag."""
        answers = self._answers.get(worker)
        return (answers.allowed_s(now) if answers else self._gone_s) + extra_s(self._lags.get(worker, 0.0))

    def on_heard(self, worker: str, now: float) -> tuple[Belief, ...]:
        """Record a sign of life. A worker that is not watched yet is watched from now on."""
        known = self._beliefs.get(worker)
        if known:
            self._answers.setdefault(worker, SlowAnswers(self._gone_s)).add(now - known.heard, now)
        if known is None or known.standing is not Standing.UP:
            known = known or Belief(worker, Standing.UP, now, now)
            return self._believe(replace(known, standing=Standing.UP, since=now, heard=now, why=""))
        self._beliefs[worker] = replace(known, heard=max(known.heard, now))
        return ()

    def on_refusal(self, worker: str, why: str, now: float) -> tuple[Belief, ...]:
        """Record proof that the worker is gone: its port is closed, or its engine has exited."""
        known = self._beliefs.get(worker)
        if known and known.standing is Standing.GONE:
            self._beliefs[worker] = replace(known, why=why)
            return ()
        return self._believe((known or Belief(worker, Standing.UP, now, now)).as_gone(why, now))

    def judge_silence(self, now: float, lag_s: float = 0.0) -> tuple[Belief, ...]:
        """Judge the silence of all workers. ``lag_s``: how late events happen on this machine, in seconds."""
        self._excuse(now)
        return tuple(b for known in tuple(self._beliefs.values()) for b in self._judge(known, now, extra_s(lag_s)))

    def _excuse(self, now: float) -> None:
        """Extend every worker's ``heard`` by a long time in which ``judge_silence`` was not called."""
        missed = now - self._judged_at if self._judged_at is not None else 0.0
        self._judged_at = now
        if missed > self._suspect_s:
            for name, b in self._beliefs.items():
                self._beliefs[name] = replace(b, heard=min(now, b.heard + missed))

    def _judge(self, known: Belief, now: float, more_s: float) -> tuple[Belief, ...]:
        silence = now - known.heard
        if known.standing is not Standing.GONE and silence >= self.allowed_silence_s(known.worker, now) + more_s:
            why = f"has not been heard for {silence:.1f} s"
            return self._believe(known.as_gone(why, now))
        if known.standing is Standing.UP and silence >= self._suspect_s + more_s:
            why = f"is late: nothing heard for {silence:.1f} s"
            return self._believe(replace(known, standing=Standing.SUSPECT, since=now, why=why))
        return ()

    def _believe(self, belief: Belief) -> tuple[Belief, ...]:
        self._beliefs[belief.worker] = belief
        return (belief,)
