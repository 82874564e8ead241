"""Says on the terminal why an answer pauses, while a lost Mac's layers are loaded elsewhere."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from cluster.core.errors import MacpipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.client import Client

PAUSE_S: Final = 1.0
"""An answer of which nothing came for this long pauses. The coordinator is asked why, each time that it has passed."""
END_S: Final = 1.0
"""How long the end of an answer waits for a question that is under way."""


class PauseWatch:
    """Watches one answer in a thread. ``tell`` is called in that thread, with one sentence for each recovery."""

    def __init__(self, client: Client, tell: Callable[[str], None], pause_s: float = PAUSE_S) -> None:
        self._client, self._tell, self._pause_s = client, tell, pause_s
        self._last = time.monotonic()
        self._told = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pause-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(END_S)

    def hear(self) -> None:
        """Note that a piece of the answer came."""
        self._last = time.monotonic()

    def _run(self) -> None:
        wait_s = self._pause_s
        while not self._ended.wait(wait_s):
            idle_s = time.monotonic() - self._last
            wait_s = self._pause_s if idle_s >= self._pause_s else self._pause_s - idle_s
            if idle_s >= self._pause_s:
                with suppress(MacpipeError):  # a coordinator that does not answer: the answer itself says why
                    self._ask()

    def _pauses(self) -> bool:
        return time.monotonic() - self._last >= self._pause_s

    def _ask(self) -> None:
        repair = self._client.cluster().repair
        if not repair:
            self._told = ""
        elif repair.attempts and repair.cause != self._told and self._pauses() and not self._ended.is_set():
            self._told = repair.cause
            self._tell(f"{repair.cause}; {repair.doing}")
