"""Why an engine ended: its exit code or signal, whether memory ran out, and the last thing it said.

It knows processes and what systems tell of them; it refuses to know what an engine does.
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

from cluster.core.limits import LAST_WORDS_S

LINE_CHARS = 300
FRESH_S = 2.0
"""What was said longer before the end has nothing to do with it."""
_OUT_OF_MEMORY = ("out of memory", "insufficient memory", "bad_alloc", "cannot allocate memory")
"""How allocators and Metal word it."""


class LastWords:
    """Passes an engine's stderr on, and keeps its last line."""

    def __init__(self, onward: BinaryIO) -> None:
        self._onward = onward
        self._lines: deque[bytes] = deque(maxlen=1)
        self._said_at = 0.0
        self._over = anyio.Event()

    @property
    def line(self) -> str:
        """The last line that has something in it; empty where there was none of late."""
        late = time.monotonic() - self._said_at > FRESH_S
        return "" if late or not self._lines else self._lines[0].decode(errors="replace")[:LINE_CHARS]

    async def follow(self, process: Process) -> None:
        """Until the process closes its stderr."""
        assert process.stderr
        self._lines.clear()
        self._over = anyio.Event()
        while data := await process.stderr.read(65536):
            with suppress(OSError, ValueError):
                self._onward.write(data)
                self._onward.flush()
            if said := [line for line in data.splitlines() if line.strip()]:
                self._lines.append(said[-1].strip())
                self._said_at = time.monotonic()
        self._over.set()

    async def heard_out(self) -> None:
        """Wait for the rest of a dead process's words; a child of its own may keep the pipe open."""
        with anyio.move_on_after(LAST_WORDS_S):
            await self._over.wait()


def cause(code: int, last_words: str, out_of_memory_kills: int = 0) -> str:
    """A sentence from an exit code (negative: a signal), what was said last, and how often the system killed for memory
    in the meantime.
    """
    ended = f"the engine ended with exit code {code}" if code >= 0 else f"the engine was ended by {_signal(-code)}"
    if out_of_memory_kills or any(words in last_words.lower() for words in _OUT_OF_MEMORY):
        ended += " because memory ran out; give it less with --memory-limit"
    elif code == -signal.SIGKILL:
        ended += ", by hand or by the system for lack of memory"
    return f"{ended} ({last_words})" if last_words else ended


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def out_of_memory_kills() -> int:
    """How many processes Linux has killed for lack of memory; 0 where the system does not count."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
