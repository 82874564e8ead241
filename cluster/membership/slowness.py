"""Extends deadlines for overloaded machines, from their measured lag, slow answers and false alarms.

Pure: seconds and keys go in, seconds come out.
"""

from __future__ import annotations

from collections import deque

from cluster.core.limits import (
    FALSE_ALARM_S,
    LAG_STEPS,
    MAX_PATIENCE,
    MAX_ROSTER,
    PATIENCE_GROWTH,
    SILENT_BUSY_SHARE,
    SLOW_ANSWER_S,
    SLOW_ANSWERS,
)


def extra_s(lag_s: float) -> float:
    """Return the additional seconds that an answer may take if each of its steps may be ``lag_s`` late."""
    return LAG_STEPS * lag_s


class SlowAnswers:
    """Learns how long one party may take, from its slowest recent answers. Times are seconds of the injected clock."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._slow: deque[tuple[float, float]] = deque(maxlen=SLOW_ANSWERS)

    def add(self, took_s: float, now: float) -> None:
        """Note that an answer came after ``took_s``."""
        if 2 * took_s > self._usual_s:
            self._slow.append((now, took_s))

    def allowed_s(self, now: float) -> float:
        """Return the seconds allowed: twice the second slowest recent answer, and at least the usual time.

        The slowest answer alone does not count: it may have been a cut link.
        """
        recent = sorted(seconds for at, seconds in self._slow if now - at < SLOW_ANSWER_S)
        learned = 2 * recent[-2] if len(recent) > 1 else 0.0
        return min(MAX_PATIENCE * self._usual_s, max(self._usual_s, learned))


class Alarms:
    """Counts by address how often a party recently fell silent. From the second time on, it may take longer.

    A dead party does not come back and fall silent again. One that does is slow, or its link is.
    """

    def __init__(self) -> None:
        self._at: dict[str, deque[float]] = {}

    def add(self, address: str, now: float) -> None:
        """Note that ``address`` fell silent."""
        if address not in self._at and len(self._at) >= MAX_ROSTER:
            del self._at[next(iter(self._at))]
        self._at.setdefault(address, deque(maxlen=SLOW_ANSWERS)).append(now)

    def growth(self, address: str, now: float) -> float:
        """Return the factor for a deadline: 1.0 after at most one recent silence."""
        recent = sum(now - at < FALSE_ALARM_S for at in self._at.get(address, ()))
        return min(MAX_PATIENCE, PATIENCE_GROWTH ** max(0, recent - 1))


class Silence:
    """Sums up how long an engine has been silent. Excused time counts ``SILENT_BUSY_SHARE`` of its length.

    Time is excused while the engine computed or no process could run.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, elapsed_s: float, *, excused: bool) -> None:
        """Add ``elapsed_s`` of silence."""
        self.seconds += elapsed_s * (SILENT_BUSY_SHARE if excused else 1.0)

    def end(self) -> None:
        """End the silence: the engine has answered."""
        self.seconds = 0.0
