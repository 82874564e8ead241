"""Signs of overload: late timers, and a child's processor time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cluster.core.limits import LAG_FLOOR_S, LAG_WINDOW_S, MAX_LAG_S
from cluster.platform.macos import parse_cpu_time
from cluster.platform.overload import TimerLag, processor_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_lag_is_the_second_worst_of_late_and_one_pause_is_none() -> None:
    clock = Clock()
    lag = TimerLag(clock)
    lag.add(LAG_FLOOR_S)
    lag.add(3600.0)  # this machine slept
    assert lag() == 0.0
    lag.add(0.4)
    assert lag() == 0.4
    lag.add(3600.0)
    assert lag() == MAX_LAG_S
    clock.now += LAG_WINDOW_S + 0.1
    assert lag() == 0.0


def test_a_thread_whose_sleeps_take_too_long_measures_it() -> None:
    late, more, clock = threading.Event(), iter((0.3, 0.3)), Clock()

    def sleep(seconds: float) -> None:
        if (more_s := next(more, None)) is None:
            late.set()
            threading.Event().wait()  # for good: it is a daemon thread
        clock.now += seconds + (more_s or 0.0)

    lag = TimerLag(clock, sleep).start()
    assert late.wait(10)
    assert lag() == pytest.approx(0.3)


def test_a_child_that_computes_gets_processor_time_and_one_that_is_stopped_none() -> None:
    busy = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(busy, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        had = processor_seconds(child.pid)
        assert had is not None
        while (processor_seconds(child.pid) or 0.0) <= had:
            pass
        child.kill()
    assert processor_seconds(child.pid) is None
    assert processor_seconds(os.getpid())


@pytest.mark.parametrize(
    ("said", "seconds"), [("  0:07.25\n", 7.25), ("12:00.00", 720.0), ("1:01:01.50", 3661.5), ("", None), ("?", None)]
)
def test_processor_time_is_read_as_macos_writes_it(said: str, seconds: float | None) -> None:
    assert parse_cpu_time(said) == seconds
