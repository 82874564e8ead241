"""A test that hangs ends: its children are killed, and they start without ignored signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from limits import Limit, seconds

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
ROOT = Path(__file__).resolve().parent.parent


def test_children_of_a_test_that_ran_out_of_time_are_killed() -> None:
    with subprocess.Popen(SLEEPER) as child:
        limit = Limit(0.0, grace_s=3600.0)
        limit.cancel()
        limit.kill_children()
        assert child.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(("etime", "age"), [("00:07", 7), ("12:00:01", 43201), ("2-01:00:00", 176400)])
def test_ages_are_read_as_ps_writes_them(etime: str, age: int) -> None:
    assert seconds(etime) == age


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
