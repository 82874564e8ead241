"""The numbers of epochs: each is larger than any before, over restarts, and wherever the wall clock goes.

It knows numbers, one clock and one small file. It refuses to know what an epoch is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.core.errors import StaleEpoch
from cluster.platform.private_files import make_private_folder, replace_file

log = logging.getLogger(__name__)

RESERVED = 60_000
"""Numbers that one write of the file covers: a minute of milliseconds, in which nobody needs the disk."""
LONGEST_AHEAD = 100 * 365 * 86_400_000
"""A worker that claims a number so many milliseconds ahead of this clock lies: believed, it would use the range up."""
_MOST_CHARS = 20


class EpochNumbers:
    """Gives out numbers. ``file`` keeps them over restarts; without it the workers' numbers and the clock have to do.

    ``clock`` is nanoseconds since 1970: a number is its milliseconds where that is larger than all before.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        self._file, self._clock = file, clock
        self._last = self._reserved = _read(file) if file else 0

    def next(self, known: Iterable[int] = ()) -> int:
        """A number larger than all that were given out, kept, learned or are ``known`` to be in use."""
        for number in known:
            self.learn(number)
        self._last = max(self._now_ms(), self._last + 1)
        if self._file and self._last > self._reserved:
            self._reserve(self._file)
        return self._last

    @property
    def last(self) -> int:
        """The largest number that was given out or learned; 0 before any."""
        return self._last

    def learn(self, number: int) -> bool:
        """Take a number as used; whether it is larger than all that were known. One that cannot be is ignored."""
        if not self._last < number <= self._now_ms() + LONGEST_AHEAD:
            return False
        self._last = number
        return True

    def learn_refusal(self, refusal: StaleEpoch) -> bool:
        """Take what a worker refused for as used; whether a number after it can be accepted."""
        said = refusal.details.get("epoch", "")
        return said.isascii() and said.isdecimal() and len(said) <= _MOST_CHARS and self.learn(int(said))

    def _now_ms(self) -> int:
        return self._clock() // 1_000_000

    def _reserve(self, file: Path) -> None:
        """Keep a number ahead of the last one, so that most numbers need no write. Tried again where that fails."""
        reserved = self._last + RESERVED
        try:
            make_private_folder(file.parent)
            replace_file(file, f"{reserved}\n".encode())
        except OSError as e:
            log.warning("epoch numbers: not kept file=%s error=%s", file, e.strerror)
        else:
            self._reserved = reserved


def _read(file: Path) -> int:
    """The number in the file; 0 where there is none."""
    try:
        with file.open("rb") as kept:
            said = kept.read(_MOST_CHARS + 1).strip()
    except OSError:
        return 0
    return int(said) if said.isdigit() and len(said) <= _MOST_CHARS else 0
