"""The commands of training that have arrived at a stage and wait for their turn. Any thread may put; one takes."""

from __future__ import annotations

import queue
import threading

from cluster.core.errors import BadFrame
from cluster.core.limits import MAX_WAITING_BYTES
from cluster.core.training_limits import MAX_COMMANDS_WAITING

__all__ = ["CommandInbox"]


class CommandInbox:
    """A queue that is bounded in number and in bytes; one message of any size may always wait."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._bytes = 0

    def put(self, message: bytes) -> None:
        """Add a message. Raises ``BadFrame`` if too many wait."""
        with self._lock:
            if self._waiting.qsize() >= MAX_COMMANDS_WAITING or (
                self._bytes and self._bytes + len(message) > MAX_WAITING_BYTES
            ):
                raise BadFrame(f"{self._waiting.qsize()} commands of {self._bytes} bytes wait on one stage already")
            self._bytes += len(message)
            self._waiting.put(message)

    def take(self) -> bytes:
        """Return the next message. There is one for each ``put``."""
        with self._lock:
            message = self._waiting.get_nowait()
            self._bytes -= len(message)
            return message
