"""A test that hangs ends: its children are killed, and they start without ignored signals."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from integration.daemons import alive
from limits import Limit, kill, seconds, started_within

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
ROOT = Path(__file__).resolve().parent.parent


def test_children_of_a_test_that_ran_out_of_time_are_killed() -> None:
    with subprocess.Popen(SLEEPER) as child:
        limit = Limit(0.0, grace_s=3600.0)
        limit.cancel()
        limit.kill_children()
        assert child.wait(10) == -signal.SIGKILL


def start_orphan() -> int:
    """Start a process in a session of its own from a shell that ends: no parent leads to it."""
    script = f"setsid {shlex.join(SLEEPER)} >/dev/null 2>&1 & echo $!"
    return int(subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10).stdout)


def wait_for_end(pid: int) -> None:
    """Wait until the process has ended, whoever its parent is."""
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="environments are read in /proc")
def test_an_orphan_of_a_test_that_ran_out_of_time_is_killed() -> None:
    limit = Limit(0.0, grace_s=3600.0)
    limit.cancel()
    orphan = start_orphan()
    try:
        limit.kill_children()
        wait_for_end(orphan)
    finally:
        kill([orphan])


LEAVING = """
from test_limits import start_orphan

def test_that_leaves_an_orphan():
    print("orphan", start_orphan())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="environments are read in /proc")
def test_an_orphan_does_not_outlive_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    plugins = ["-p", "pytest_timeout", "-p", "limits"]  # autoload would import those of other packages too
    command = [sys.executable, "-m", "pytest", *plugins, "-s", "-q", "--rootdir", str(tmp_path)]
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"orphan (\d+)", run.stdout)
    assert found
    try:
        wait_for_end(int(found[1]))
    finally:
        kill([int(found[1])])


@pytest.mark.parametrize(("etime", "age"), [("00:07", 7), ("12:00:01", 43201), ("2-01:00:00", 176400)])
def test_ages_are_read_as_ps_writes_them(etime: str, age: int) -> None:
    assert seconds(etime) == age


def test_no_property_fails_because_an_example_took_long() -> None:
    """The deadline of 200 ms, and a check of how fast inputs are made, failed on a loaded machine."""
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_a_process_may_be_younger_than_ps_writes() -> None:
    """The orphan of a test that began 0.02 s ago was spared where ``ps`` wrote 00:01."""
    assert started_within("00:01", 0.02)
    assert not started_within("00:02", 0.02)


def test_children_ignore_no_signal_under_nohup() -> None:
    """``nohup ops/test &`` starts its tests with SIGHUP and SIGINT ignored."""
    probe = "import signal as s; print(s.getsignal(s.SIGHUP) == s.SIG_DFL, s.getsignal(s.SIGINT) != s.SIG_IGN)"
    code = (
        "import signal, subprocess, sys, os; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); import limits; limits.reset_inherited_signals();"
        "os.kill(os.getpid(), signal.SIGHUP);"  # it goes on ignoring them itself
        f"sys.exit(subprocess.run([sys.executable, '-c', {probe!r}]).returncode)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False, cwd=ROOT / "tests"
    )
    assert (told.returncode, told.stdout) == (0, "True True\n"), told
