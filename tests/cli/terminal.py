"""A terminal for tests: runs a process on its own pseudo-terminal, types into it and reads its output."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, Self

TAKE_TERMINAL: Final = (
    "import fcntl,os,sys,termios; fcntl.ioctl(0,termios.TIOCSCTTY,0); os.execv(sys.argv[1],sys.argv[1:])"
)
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Runs ``command`` as a shell's foreground process; the end of the context kills it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        """Type as slowly as a person: readline misses a Ctrl-C in the instant between its prompt and its wait."""
        time.sleep(0.2)
        os.write(self._master, keys.encode())

    def wait_for(self, words: str, seconds: float = 40) -> str:
        """Read on until ``words`` are shown; returns what was shown since the last wait, up to them."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < deadline, f"no {words!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += self._read()
        before, _, self.shown = self.shown.partition(words)
        return before

    def end(self, seconds: float = 40) -> tuple[int, str]:
        """Read on until the process ends; returns its exit code and what it showed since the last wait."""
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None or select.select([self._master], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, f"it goes on: {self.shown!r}"
            if not select.select([self._master], [], [], 0.1)[0]:
                continue
            piece = self._read()
            self.shown += piece
            if not piece and code is not None:
                break
        return self.process.wait(5), self.shown

    def _read(self) -> str:
        try:
            return os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # Linux says so when the last process has left the terminal
            return ""
