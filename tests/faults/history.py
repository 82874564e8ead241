"""The history of a run: requests, tokens, ends and faults, each with its time, as JSON lines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class History:
    """Events of one seed, in the order in which they were seen. Any thread may write."""

    events: list[dict[str, Any]] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, event: str, **facts: Any) -> float:
        """Write one event down; its time (in the clock's seconds)."""
        now = self.clock()
        with self._lock:
            self.events.append({"t": round(now, 4), "event": event, **facts})
        return now

    def of(self, event: str) -> list[dict[str, Any]]:
        with self._lock:
            return [e for e in self.events if e["event"] == event]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(e) + "\n" for e in self.events)

    @classmethod
    def load(cls, path: Path) -> History:
        return cls([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
