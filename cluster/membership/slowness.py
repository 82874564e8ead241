"""How much longer an overloaded machine may take: from how late things happened there, and from false alarms.

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
    """Return the seconds that an answer may take in addition where each step on its way may be ``lag_s`` late."""
    return LAG_STEPS * lag_s


class SlowAnswers:
    """Learns from the slowest recent answers of one party how long it may take. Times are the injected clock's."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._slow: deque[tuple[float, float]] = deque(maxlen=SLOW_ANSWERS)

    def add(self, took_s: float, now: float) -> None:
        """Note that an answer came after ``took_s``."""
        if 2 * took_s > self._usual_s:
            self._slow.append((now, took_s))

    def granted(self, now: float) -> float:
        """Return twice the second slowest recent answer, and never less than usual: one alone may have been a cut."""
        recent = sorted(took for at, took in self._slow if now - at < SLOW_ANSWER_S)
        learned = 2 * recent[-2] if len(recent) > 1 else 0.0
        return min(MAX_PATIENCE * self._usual_s, max(self._usual_s, learned))


class Alarms:
    """Counts by address how often a party fell silent of late. From the second time on, it may take longer.

    A party that is dead does not come back to fall silent again; one that does was slow, or its link is.
    """

    def __init__(self) -> None:
        self._at: dict[str, deque[float]] = {}

    def add(self, address: str, now: float) -> None:
        """Note that ``address`` fell silent."""
        if address not in self._at and len(self._at) >= MAX_ROSTER:
            del self._at[next(iter(self._at))]
        self._at.setdefault(address, deque(maxlen=SLOW_ANSWERS)).append(now)

    def growth(self, address: str, now: float) -> float:
        """Return by what a deadline is multiplied; 1.0 after no more than one silence."""
        recent = sum(now - at < FALSE_ALARM_S for at in self._at.get(address, ()))
        return min(MAX_PATIENCE, PATIENCE_GROWTH ** max(0, recent - 1))


class Silence:
    """Adds up how long an engine has been silent. Time in which it computed, or nobody could, counts for less."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, elapsed_s: float, *, excused: bool) -> None:
        """Note that it said nothing for ``elapsed_s``."""
        self.seconds += elapsed_s * (SILENT_BUSY_SHARE if excused else 1.0)

    def end(self) -> None:
        """Note that it said something."""
        self.seconds = 0.0
