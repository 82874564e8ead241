"""How our processes start, which limits they have, how much memory they hold, and how they end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio

from cluster.core.errors import MacpipeError
from cluster.core.limits import OPEN_FILES
from cluster.platform.paths import absolute_path


def isolated_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python imports nothing from the current folder.

    That folder may be a model's and contain modules of its own. macpipe itself is importable from any folder.
    """
    places = [str(Path(__file__).parent.parent.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = [absolute_path(Path(place)) for place in places if place]
    return {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, found))}


def accept_signals() -> None:
    """Undo inherited signal settings that would keep this process from ending or from noticing its children's end.

    Unblocks all signals, and stops ignoring SIGINT, SIGTERM and SIGCHLD. SIGHUP is left alone: `nohup` ignores it on
    purpose.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


async def stop_on_signal(scope: anyio.CancelScope) -> None:
    """Cancel ``scope`` on SIGINT or SIGTERM."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def first_error(group: BaseExceptionGroup[MacpipeError]) -> MacpipeError:
    """Return the first error in a task group's exception."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


GRACE_S: Final = 10.0
"""Time that the process gets to end by itself after SIGTERM."""


def end_with_stdin() -> None:
    """Send this process SIGTERM at the end of standard input, and SIGKILL ``GRACE_S`` later."""
    threading.Thread(target=_watch_stdin, args=(sys.stdin.fileno(),), name="parent-watchdog", daemon=True).start()


def _watch_stdin(stdin: int) -> None:
    while os.read(stdin, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def allow_open_files() -> int:
    """Raise this process's limit of open files to ``OPEN_FILES``, or as far as allowed, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


PS_TIMEOUT_S: Final = 2.0
"""Timeout of ``ps``, in seconds."""


def resident_bytes(pid: int, platform: str = sys.platform) -> int:
    """Return the resident bytes of process ``pid``; 0 if it has ended or is unknown. May block for milliseconds."""
    try:
        return _from_proc(pid) if platform == "linux" else _from_ps(pid)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0


def _from_proc(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * resource.getpagesize()


def _from_ps(pid: int) -> int:
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    return int(subprocess.run(command, capture_output=True, timeout=PS_TIMEOUT_S, check=True).stdout) << 10


def list_commands() -> str:
    """Return a line for each process: its id, its parent's id, and its command; empty if ``ps`` fails."""
    command = ["ps", "-axwwo", "pid=,ppid=,command="]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PS_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
