"""How a process of ours starts, what limits it has, and when it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
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
    """An environment in which Python imports nothing from the folder where a person has started the daemon.

    That folder may be a model's, and have modules of its own. This program is found where it is, from any folder.
    """
    places = [str(Path(__file__).parent.parent.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = [absolute_path(Path(place)) for place in places if place]
    return {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, found))}


def accept_signals() -> None:
    """Undo what a parent left behind that would keep this process from ending, or from seeing its children end.

    Nothing is blocked any more, and SIGINT, SIGTERM and SIGCHLD are ignored no more. SIGHUP stays as it is: `nohup`
    ignores it on purpose.
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
    """The first of the errors that a task group collected."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


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


def allow_open_files() -> int:
    """Raise this process's own limit to ``OPEN_FILES``, or as far as the system allows; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a bound of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
