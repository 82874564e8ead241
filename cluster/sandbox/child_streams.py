"""Starts a child process that talks over one socket, and sets up the child's end of it: its stdin and stdout."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Mapping
from subprocess import Popen
from typing import BinaryIO

from cluster.platform.process import isolated_environment

__all__ = ["end_with_parent", "separate_stdout", "start_child"]


def start_child(
    module: str, environment: Mapping[str, str], stderr: int | None = None
) -> tuple[Popen[bytes], socket.socket]:
    """Start ``python -m module``. Return its process and the parent's end of its socket. Raises OSError.

    ``environment`` extends this process's. ``stderr`` is as for Popen.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            command = (sys.executable, "-m", module)
            extended = {**isolated_environment(os.environ), **environment}
            end = theirs.fileno()
            return Popen(command, stdin=end, stdout=end, stderr=stderr, env=extended), ours
        except OSError:
            ours.close()
            raise


def separate_stdout() -> BinaryIO:
    """Reserve stdout for replies; redirect the output of libraries to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def end_with_parent() -> None:
    """End this process when the other end of stdin closes, whatever it does then. Returns at once."""
    threading.Thread(target=_wait_and_end, name="parent", daemon=True).start()


def _wait_and_end() -> None:
    poll = select.poll()
    poll.register(0, 0)  # no events: only the end of stdin is reported
    poll.poll()
    os._exit(0)
