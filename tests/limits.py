"""Enforce time limits: no test outlives its own, and children start with default signal handling.

pytest-timeout raises in the test. A test that then waits for a child, as leaving ``with Popen(...)`` does, would hang:
so its children are killed a moment later. If it hangs even then, this process prints all stacks and ends.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

GRACE_S = 10.0
"""From a test's time limit until its children are killed, and again until this process ends."""
INHERITED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_LIMIT = pytest.StashKey["Limit"]()


def reset_inherited_signals() -> None:
    """Give children default dispositions for signals that this process was started with ignored or blocked.

    ``nohup`` ignores SIGHUP, a shell's ``&`` SIGINT, and children inherit that. A handler is not inherited: with one
    that does nothing, this process goes on ignoring the signal and its children do not.
    """
    for number in INHERITED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INHERITED)


def seconds(etime: str) -> int:
    """Seconds that ``ps`` writes as ``[[dd-]hh:]mm:ss``."""
    days, _, clock = etime.rpartition("-")
    return int(days or 0) * 86400 + sum(int(part) * 60**i for i, part in enumerate(reversed(clock.split(":"))))


def descendants(pid: int, younger_than_s: float) -> list[int]:
    """Return processes that descend from ``pid`` and started less than ``younger_than_s`` ago."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,etime="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    found, parents = [], {pid}
    while parents:
        born = [(int(child), seconds(age)) for child, parent, age in rows if int(parent) in parents]
        found += [child for child, age in born if age <= younger_than_s]
        parents = {child for child, _ in born}
    return found


class Limit:
    """Ends what one test leaves running ``limit_s`` + ``grace_s`` after now, unless cancelled before."""

    def __init__(self, limit_s: float, grace_s: float = GRACE_S) -> None:
        self._began = time.monotonic()
        self._timer = threading.Timer(limit_s + grace_s, self.kill_children)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(limit_s + 2 * grace_s, exit=True, file=sys.__stderr__)

    def kill_children(self) -> None:
        """Kill this process's descendants that are no older than the test; shared daemons survive."""
        for pid in descendants(os.getpid(), time.monotonic() - self._began):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # ps itself is among them
                continue

    def cancel(self) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def pytest_configure(config: pytest.Config) -> None:
    if threading.current_thread() is threading.main_thread():
        reset_inherited_signals()


@pytest.hookimpl(hookwrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[None]:
    """Follow pytest-timeout, which knows the item's limit."""
    item.stash[_LIMIT] = Limit(settings.timeout)
    yield


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    yield
    if limit := item.stash.get(_LIMIT, None):
        limit.cancel()
