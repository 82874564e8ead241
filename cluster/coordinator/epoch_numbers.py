"""Issue epoch numbers that always increase, across restarts and even if the wall clock is set back.

This module knows numbers, one clock and one small file. It refuses to know what an epoch is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.core.errors import StaleEpoch
from cluster.platform.json_file import read_json, write_json

log = logging.getLogger(__name__)

RESERVED = 60_000
"""Numbers reserved by one write of the file: a minute in milliseconds, so most numbers need no disk access."""
LONGEST_AHEAD = 100 * 365 * 86_400_000
"""Maximum milliseconds that a claimed number may be ahead of this clock. A larger one could use up the range."""
_MAX_CHARS = 20


class EpochNumbers:
    """Issues epoch numbers. A number is the clock's milliseconds, or the last number plus one if that is larger.

    ``file`` keeps the numbers across restarts. Without it, only the workers' numbers and the clock prevent reuse.
    ``clock`` returns nanoseconds since 1970.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        self._file, self._clock = file, clock
        self._last = self._reserved = _read(file) if file else 0

    def next(self, known: Iterable[int] = ()) -> int:
        """Return a number larger than all issued, stored, learned and ``known`` ones."""
        for number in known:
            self.learn(number)
        self._last = max(self._now_ms(), self._last + 1)
        if self._file and self._last > self._reserved:
            self._reserve(self._file)
        return self._last

    @property
    def last(self) -> int:
        """The largest number issued or learned; 0 at first."""
        return self._last

    def learn(self, number: int) -> bool:
        """Mark a number as used. Return False for one that is not larger than ``last``, or is implausibly large."""
        if not self._last < number <= self._now_ms() + LONGEST_AHEAD:
            return False
        self._last = number
        return True

    def learn_refusal(self, refusal: StaleEpoch) -> bool:
        """Mark the number named in a worker's refusal as used. Return whether a retry with a larger number may work."""
        text = refusal.details.get("epoch", "")
        return text.isascii() and text.isdecimal() and len(text) <= _MAX_CHARS and self.learn(int(text))

    def _now_ms(self) -> int:
        return self._clock() // 1_000_000

    def _reserve(self, file: Path) -> None:
        """Store a number ahead of the last one, so that most numbers need no write. A failed write is retried later."""
        reserved = self._last + RESERVED
        try:
            write_json(file, reserved)
        except OSError as e:
            log.warning("epoch numbers: not stored reason=%s file=%s", e.strerror, file)
        else:
            self._reserved = reserved


def _read(file: Path) -> int:
    """Return the number in the file; 0 if the file is missing or invalid."""
    try:
        number = read_json(file, _MAX_CHARS + 1)
    except (OSError, ValueError):
        return 0
    return number if type(number) is int and number >= 0 else 0
