"""Read how much power this Mac takes, from macmon where it is installed (https://github.com/vladkens/macmon).

``macmon pipe`` writes a JSON object each interval. Without macmon, or once it has ended, nothing is known.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Final

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
COMMAND: Final = ("macmon", "pipe", "--interval", f"{INTERVAL_S * 1e3:.0f}")
STALE_S: Final = 10.0
"""After this long without a line, the power is not known."""
FOLDERS: Final = ("/opt/homebrew/bin", "/usr/local/bin", "/opt/local/bin")
"""Where Homebrew and MacPorts install; launchd does not look there."""
MAX_LINE: Final = 65_536
MAX_WATTS: Final = 10_000.0
STOP_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class PowerReading:
    """The present power, and the energy since the first reading; zeros if nothing is known."""

    watts: float = 0.0
    joules: float = 0.0


def no_power() -> PowerReading:
    """Return that nothing is known."""
    return PowerReading()


class PowerMeter:
    """Reads macmon's lines in a thread of its own, if macmon is installed. Close it."""

    def __init__(self, command: Sequence[str] = COMMAND, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._watts = self._joules = 0.0
        self._at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        if (program := shutil.which(command[0], path=os.pathsep.join((os.environ.get("PATH", ""), *FOLDERS)))) is None:
            return
        try:
            self._process = subprocess.Popen(
                [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as e:
            log.warning("power: macmon not started reason=%s", e.strerror or e)
            return
        assert self._process.stdout
        self._thread = threading.Thread(target=self._read, args=(self._process.stdout,), name="power", daemon=True)
        self._thread.start()

    def read(self) -> PowerReading:
        """Return the present power and the energy up to now."""
        now = self._clock()
        with self._lock:
            if self._at is None:
                return PowerReading()
            since = now - self._at
            if since > STALE_S:
                return PowerReading(0.0, self._joules)
            return PowerReading(self._watts, self._joules + self._watts * since)

    def note(self, line: bytes) -> None:
        """Take a line of macmon's. One that has no power is ignored."""
        watts = parse_power(line)
        if watts is None:
            return
        now = self._clock()
        with self._lock:
            if self._at is not None and now - self._at <= STALE_S:
                self._joules += self._watts * (now - self._at)
            self._watts, self._at = watts, now

    def close(self) -> None:
        """End macmon."""
        self._closing = True
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(STOP_S)
        self._thread.join(STOP_S)

    def _read(self, lines: IO[bytes]) -> None:
        with lines:
            while line := lines.readline(MAX_LINE):
                self.note(line)
        if not self._closing:
            log.warning("power: macmon ended, so that the power of this Mac is not known any more")


def parse_power(line: bytes) -> float | None:
    """Return the watts in a line of ``macmon pipe``: the whole Mac's, else its chip's; None if it has neither."""
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    if not isinstance(facts, dict):
        return None
    for name in ("sys_power", "all_power"):
        watts = facts.get(name)
        if isinstance(watts, float | int) and math.isfinite(watts) and 0 < watts <= MAX_WATTS:
            return float(watts)
    return None
