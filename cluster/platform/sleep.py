"""Keeps this Mac awake while there is work: macOS would put it to sleep in the middle of an answer.

Only idle sleep is prevented: the display may go dark, and closing a lid still puts a MacBook to sleep.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio

log = logging.getLogger(__name__)

CHECK_S: Final = 5.0
"""Seconds between two looks at whether there is work. macOS sleeps after a minute of idling at the earliest."""
LINGER_S: Final = 60.0
"""Seconds without work after which this Mac may sleep, so that the turns of a chat do not start a process each."""


def caffeinate_command() -> tuple[str, ...]:
    """Return the command that keeps this Mac awake while it runs; empty on another system.

    It ends with this process too, even if that is killed.
    """
    return ("caffeinate", "-i", "-w", str(os.getpid())) if sys.platform == "darwin" else ()


async def stay_awake(
    is_busy: Callable[[], bool],
    command: Sequence[str] | None = None,
    check_s: float = CHECK_S,
    linger_s: float = LINGER_S,
) -> None:
    """Run ``command``, by default caffeinate, while ``is_busy`` and ``linger_s`` longer, until cancelled.

    A command that cannot be started is logged once and not tried again.
    """
    command = caffeinate_command() if command is None else command
    if not command:
        return
    process: subprocess.Popen[bytes] | None = None
    last_busy = -linger_s
    try:
        while True:
            now = time.monotonic()
            last_busy = now if is_busy() else last_busy
            if now - last_busy < linger_s and (process is None or process.poll() is not None):
                process = start_assertion(command)
                if process is None:
                    return
            elif now - last_busy >= linger_s and process:
                end_assertion(process)
                process = None
            await anyio.sleep(check_s)
    finally:
        if process:
            end_assertion(process)


def start_assertion(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """Start the command. Log and return None if that fails."""
    quiet = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError as e:
        log.warning("sleep: this Mac may sleep while it works reason=%s command=%s", e.strerror, command[0])
        return None
    log.debug("sleep: prevented while there is work pid=%d", process.pid)
    return process


def end_assertion(process: subprocess.Popen[bytes]) -> None:
    """End the command, so that this Mac may sleep."""
    with suppress(ProcessLookupError):
        process.kill()  # it has nothing to clean up; the assertion ends with it
    process.wait()
    log.debug("sleep: allowed again")
