"""Enforce time limits: no test outlives its own, and children start with default signal handling.

pytest-timeout raises in the test. A test that then waits for a child, as leaving ``with Popen(...)`` does, would hang:
so its children are killed a moment later. If it hangs even then, this process prints all stacks and ends.

On Linux a child whose parent has ended, such as one that a shell started in the background, is known by a variable in
its environment. What is left of these when the tests are over is killed too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

GRACE_S = 10.0
"""From a test's time limit until its children are killed, and again until this process ends."""
INHERITED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
MARK = "TESTS_PROCESS"
"""Environment variable of everything that tests start: the id of the process that runs the tests."""
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


def started_within(etime: str, period_s: float) -> bool:
    """Say whether a process of this age may have started in the last ``period_s``.

    ``ps`` subtracts two times that are each cut to whole seconds, so a process that is 0.02 s old can have the age
    00:01. So one second more is allowed: sparing a test's process is worse than killing one that is a second older.
    """
    return seconds(etime) <= period_s + 1


def marked() -> set[int]:
    """Return the other processes whose environment names this one in ``MARK``; on Linux only."""
    wanted, found = f"{MARK}={os.getpid()}".encode(), set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in file.read_bytes().split(b"\0"):
                found.add(int(file.parent.name))
    return found - {os.getpid()}


def descendants(pid: int, younger_than_s: float) -> list[int]:
    """Return processes that descend from ``pid`` or are ``marked``, and started less than ``younger_than_s`` ago."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,etime="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    orphans = marked()
    found = [int(child) for child, _, age in rows if int(child) in orphans and started_within(age, younger_than_s)]
    parents = {pid}
    while parents:
        born = [(int(child), age) for child, parent, age in rows if int(parent) in parents]
        found += [child for child, age in born if started_within(age, younger_than_s) and child not in orphans]
        parents = {child for child, _ in born}
    return found


def kill(pids: Iterable[int]) -> None:
    """Kill these processes; some may have ended, as ``ps`` itself has."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
        kill(descendants(os.getpid(), time.monotonic() - self._began))

    def cancel(self) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def pytest_configure(config: pytest.Config) -> None:
    if threading.current_thread() is threading.main_thread():
        reset_inherited_signals()
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":  # xdist's own children are no test's
        os.environ[MARK] = str(os.getpid())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Kill what outlived its test."""
    if os.environ.get(MARK) == str(os.getpid()):
        kill(marked())


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
