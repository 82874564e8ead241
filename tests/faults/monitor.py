"""Call ``status`` continuously during faults and record how long each answer took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from cluster.client import Client
from cluster.core.errors import MacpipeError

EVERY_S = 0.2
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Answered:
    """One call: when it began (monotonic seconds), how long it took or has taken so far, and its error if it failed."""

    began: float
    took_s: float
    error: str = ""


class StatusMonitor:
    """Calls one coordinator from its own thread until it is closed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._answers: list[Answered] = []
        self._began: float | None = None
        self._thread = threading.Thread(target=self._ask_all_the_time, name="status", daemon=True)
        self._thread.start()

    def take(self) -> list[Answered]:
        """Return every call since the last time, including a call without an answer yet."""
        with self._lock:
            answers, self._answers = self._answers, []
            open_call = [Answered(self._began, time.monotonic() - self._began)] if self._began else []
        return answers + open_call

    def close(self) -> None:
        self._closed.set()
        self._thread.join(PATIENCE_S + EVERY_S)

    def _ask_all_the_time(self) -> None:
        with Client(self._address, timeout_s=PATIENCE_S) as client:
            while not self._closed.wait(EVERY_S):
                self._ask(client)

    def _ask(self, client: Client) -> None:
        error = ""
        with self._lock:
            began = self._began = time.monotonic()
        try:
            client.cluster()
        except MacpipeError as e:
            error = f"{e.reason}: {e.sentence}"
        with self._lock:
            self._began = None
            if not self._closed.is_set():
                self._answers.append(Answered(began, time.monotonic() - began, error))
