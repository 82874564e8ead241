"""Read single keys from a terminal while a live view is on the screen."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import Final

READ_BYTES: Final = 64


class Key(Enum):
    """The keys that views know."""

    QUIT = auto()
    UP = auto()
    DOWN = auto()
    PAGE_UP = auto()
    PAGE_DOWN = auto()


_KEYS: Final = {
    b"q": Key.QUIT,
    b"Q": Key.QUIT,
    b"\x04": Key.QUIT,
    b"k": Key.UP,
    b"j": Key.DOWN,
    b"\x1b[A": Key.UP,
    b"\x1bOA": Key.UP,
    b"\x1b[B": Key.DOWN,
    b"\x1bOB": Key.DOWN,
    b"\x1b[5~": Key.PAGE_UP,
    b"\x1b[6~": Key.PAGE_DOWN,
    b" ": Key.PAGE_DOWN,
}
_LONGEST: Final = max(map(len, _KEYS))


def parse_keys(typed: bytes) -> list[Key]:
    """Return the known keys among typed bytes, in order. Other bytes have no effect."""
    found = []
    while typed:
        size = next((n for n in range(_LONGEST, 0, -1) if typed[:n] in _KEYS), 0)
        if size:
            found.append(_KEYS[typed[:size]])
        typed = typed[size or 1 :]
    return found


@contextmanager
def listen(pressed: Callable[[Key], None]) -> Iterator[None]:
    """Call ``pressed`` on the running event loop for each key. Does nothing if stdin is no terminal.

    Ctrl-C still interrupts. The terminal's mode is restored at the end.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    loop = asyncio.get_running_loop()

    def read() -> None:
        with suppress(OSError):  # the terminal has closed; a signal ends the process
            for key in parse_keys(os.read(fd, READ_BYTES)):
                pressed(key)

    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    loop.add_reader(fd, read)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
