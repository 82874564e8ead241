"""Diagnose why an engine ended: its exit code or signal, whether memory ran out, and its last line of output.

It knows processes and what systems tell about them; it knows nothing of an engine's work.
"""

from __future__ import annotations

import signal
import time
from asyncio.subprocess import Process
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import anyio

from cluster.core.limits import SHUTDOWN_GRACE_S

LINE_CHARS = 300
FRESH_S = 2.0
"""Output that is older than this at the end has nothing to do with it."""
_OUT_OF_MEMORY = ("out of memory", "insufficient memory", "bad_alloc", "cannot allocate memory")
"""The words of allocators and of Metal."""


class OutputTail:
    """Forwards an engine's stderr and keeps its last line."""

    def __init__(self, onward: BinaryIO) -> None:
        self._onward = onward
        self._lines: deque[bytes] = deque(maxlen=1)
        self._said_at = 0.0
        self._over = anyio.Event()

    @property
    def line(self) -> str:
        """The last non-empty line; empty if there was none within ``FRESH_S``."""
        stale = time.monotonic() - self._said_at > FRESH_S
        return "" if stale or not self._lines else self._lines[0].decode(errors="replace")[:LINE_CHARS]

    async def follow(self, process: Process) -> None:
        """Forward output until the process closes its stderr."""
        assert process.stderr
        self._lines.clear()
        self._over = anyio.Event()
        while data := await process.stderr.read(65536):
            with suppress(OSError, ValueError):
                self._onward.write(data)
                self._onward.flush()
            if lines := [line for line in data.splitlines() if line.strip()]:
                self._lines.append(lines[-1].strip())
                self._said_at = time.monotonic()
        self._over.set()

    async def wait_for_end(self) -> None:
        """Wait for the rest of a dead process's output, with a deadline: its own child may keep the pipe open."""
        with anyio.move_on_after(SHUTDOWN_GRACE_S):
            await self._over.wait()


def explain_exit(code: int, output_tail: str, out_of_memory_kills: int = 0) -> str:
    """Return a sentence about an exit.

    ``code`` is the exit code (negative: a signal), ``output_tail`` the last line of output, ``out_of_memory_kills`` how
    many processes the system killed for lack of memory meanwhile.
    """
    ended = f"the engine ended with exit code {code}" if code >= 0 else f"the engine was ended by {_signal(-code)}"
    if out_of_memory_kills or any(words in output_tail.lower() for words in _OUT_OF_MEMORY):
        ended += " because memory ran out; give it less with --memory-limit"
    elif code == -signal.SIGKILL:
        ended += ", by hand or by the system for lack of memory"
    return f"{ended} ({output_tail})" if output_tail else ended


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def out_of_memory_kills() -> int:
    """Return how many processes Linux has killed for lack of memory; 0 if the system does not count them."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
