"""Signs that a machine is overloaded: how late timers fire in this process, and a child's processor time.

A process that gets no processor time must not judge others by the clock: their messages may wait unread here. This
module measures; ``cluster.membership`` decides what follows.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cluster.core.limits import LAG_FLOOR_S, LAG_TICK_S, LAG_WINDOW_S, MAX_LAG_S
from cluster.platform.macos import process_seconds

Lag = Callable[[], float]
"""Return the present lag of a machine in seconds; 0.0 where it is not overloaded."""


def no_lag() -> float:
    """Return the lag of a machine that is never overloaded."""
    return 0.0


class TimerLag:
    """Measures the lag of this process on its own thread: how much longer a sleep takes than it should.

    The thread needs the processor and the interpreter, as everything else in this process does.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._late: deque[tuple[float, float]] = deque(maxlen=int(LAG_WINDOW_S / LAG_TICK_S))

    def start(self) -> TimerLag:
        """Start measuring, until the process ends."""
        threading.Thread(target=self._run, name="timer-lag", daemon=True).start()
        return self

    def _run(self) -> None:
        while True:
            began = self._clock()
            self._sleep(LAG_TICK_S)
            self.add(self._clock() - began - LAG_TICK_S)

    def add(self, late_s: float) -> None:
        """Note that a timer fired ``late_s`` seconds late."""
        if late_s > LAG_FLOOR_S:
            self._late.append((self._clock(), late_s))

    def __call__(self) -> float:
        """Return the second worst lag of the last ``LAG_WINDOW_S``: one alone was a pause, such as a sleep."""
        since = self._clock() - LAG_WINDOW_S
        recent = sorted(late for at, late in tuple(self._late) if at >= since)
        return min(recent[-2], MAX_LAG_S) if len(recent) > 1 else 0.0


def processor_seconds(pid: int) -> float | None:
    """Return the processor time that a process has had, all of its threads together; None if that is unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return process_seconds(pid)
