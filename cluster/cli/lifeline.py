"""A process that must not outlive its parent: it ends when its standard input does.

The parent holds the other end of the pipe, so the kernel closes it however the parent dies. Works on every platform.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Final

GRACE_S: Final = 10.0
"""What the process gets to end by itself, after SIGTERM."""


def end_with_stdin() -> None:
    """From now on: at the end of standard input this process gets SIGTERM, and SIGKILL ``GRACE_S`` later."""
    threading.Thread(target=_watch, args=(sys.stdin.fileno(),), name="lifeline", daemon=True).start()


def _watch(stdin: int) -> None:
    while os.read(stdin, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
