"""Measure the cost of one input: an entry handles it in a forked process with limits.

Three figures. The longest stretch for which an event loop could do nothing else: a timer on the loop should fire every
two milliseconds, and what it is late by counts as far as this process computed meanwhile, so that other programs of the
machine are not charged to the input. The processor time of all threads and of all child processes. The growth of
resident memory to its peak, child processes included. The input's own bytes are there before, and do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import select
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

LOOP_MS: Final = 50.0
CPU_S: Final = 0.5
MEMORY_MIB: Final = 256.0
"""What an input may cost."""
PERIOD_S: Final = 0.002
KILL_CPU_S: Final = 6
KILL_WALL_S: Final = 120.0
ROOM_BYTES: Final = 2 << 30
"""Where a measurement ends in any case; of address space, above what the process had before."""
SLACK_S: Final = 0.1
SLACK: Final = 1.1
"""A child process is ended a little above its limits; its time is known to a hundredth of a second."""
LOOK_S: Final = 0.02
"""How often child processes are looked at, from outside."""
_READY: Final = b"\n"
TICK: Final = os.sysconf("SC_CLK_TCK")
PAGE: Final = resource.getpagesize()

Work = Callable[[int], Awaitable[str]]
"""Handles one copy of an input, of which the number is given; what became of it, in a word or two."""


@dataclass(frozen=True, slots=True)
class Cost:
    """``loop_ms``; ``cpu_s`` for each copy; ``mib`` for all copies together; and what became of the first copy.

    Child processes are counted apart: ``child_cpu_s`` for each copy, ``child_mib`` for the largest process. ``killed``:
    the figures are those at which the process was ended.
    """

    loop_ms: float
    cpu_s: float
    mib: float
    outcome: str
    child_cpu_s: float = 0.0
    child_mib: float = 0.0
    killed: bool = False

    def score(self, child_cpu_s: float = CPU_S, child_mib: float = MEMORY_MIB, cpu_s: float = CPU_S) -> float:
        """Above 1 where it is more than an input may cost; the dearest figure decides. The arguments are what child
        processes may cost, which are only looked at now and then, and this process's seconds.
        """
        own = max(self.loop_ms / LOOP_MS, self.cpu_s / cpu_s, self.mib / MEMORY_MIB)
        child = max((self.child_cpu_s - SLACK_S) / child_cpu_s, self.child_mib / child_mib / SLACK)
        return max(own, child)


class LoopProbe:
    """Finds the longest stretch for which the running loop was kept from its timers."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._then = (time.perf_counter(), time.process_time())
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._tick)

    def stop(self) -> None:
        self._tick()
        self._timer.cancel()

    def _tick(self) -> None:
        now = (time.perf_counter(), time.process_time())
        late = min(now[0] - self._then[0], now[1] - self._then[1]) - PERIOD_S
        self.longest_s = max(self.longest_s, late)
        self._then = now
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._tick)


Warm = Callable[[], Awaitable[str]]
"""Is done before the work, and does not count; what it returns, unless empty, is the outcome, and no work is done."""


def measure(work: Work, copies: int = 1, warm: Warm | None = None) -> Cost:
    """Fork, and do the work there, ``copies`` at once, after ``warm``."""
    read, write = os.pipe()
    began, child = time.monotonic(), os.fork()
    if not child:
        os.close(read)
        _measure_here(work, copies, warm, write)
    os.close(write)
    try:
        return _watch(child, read, copies, began)
    finally:
        os.close(read)


def _measure_here(work: Work, copies: int, warm: Warm | None, write: int) -> None:
    """The child's part; it never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say as they give up, a page each time
        logging.disable()
        _bound()
        with open(write, "wb", buffering=0) as out:
            out.write(json.dumps(asyncio.run(_measured(work, copies, warm, out.write))).encode())
        code = 0
    except BaseException as e:  # the process's edge: a MemoryError may come anywhere
        code = 2 if isinstance(e, MemoryError) else 1
    finally:
        os._exit(code)


def _bound() -> None:
    space = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (space + ROOM_BYTES, space + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


async def _measured(work: Work, copies: int, warm: Warm | None, say: Callable[[bytes], object]) -> dict[str, object]:
    outcome = await warm() if warm else ""
    gc.freeze()  # as the coordinator does once it serves
    say(_READY)
    return asdict(Cost(0.0, 0.0, 0.0, outcome) if outcome else await measured_here(work, copies))


async def measured_here(work: Work, copies: int = 1) -> Cost:
    """Do the work in this process, without limits. What it holds already makes the growth of memory look smaller."""
    gc.collect()
    _forget_peak("self")
    before = _status("VmRSS")
    spent = time.process_time()
    probe = LoopProbe()
    await asyncio.sleep(2 * PERIOD_S)
    outcomes = await asyncio.gather(*(_outcome(work, copy) for copy in range(copies)))
    probe.stop()
    return Cost(
        loop_ms=1e3 * probe.longest_s,
        cpu_s=(time.process_time() - spent) / copies,
        mib=max(0, _status("VmHWM") - before) / 1024,
        outcome=outcomes[0],
    )


async def _outcome(work: Work, copy: int) -> str:
    try:
        return await work(copy)
    except Exception as e:  # an untyped error is what the search looks for beside costs
        return f"!! {type(e).__name__}: {str(e)[:60]}"
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit | asyncio.CancelledError):
            raise
        return f"!! {type(e).__name__}"  # a panic of Rust's is none of Exception's


def _forget_peak(pid: int | str) -> None:
    """From now on the peak of a process's memory is what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(field: str, pid: int | str = "self") -> int:
    """Return a figure of a process's memory in KiB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


class _Children:
    """The processes that a measured one has started: their time, and the peak of their memory."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._base: dict[int, tuple[float, int]] = {}
        self._seen: dict[int, tuple[float, int]] = {}

    def ignore_past(self) -> None:
        """Exclude their cost so far."""
        for pid in descendants(self._root):
            try:
                _forget_peak(pid)
            except OSError:
                continue
            self._base[pid] = (_cpu_s(pid), _status("VmRSS", pid))

    def look(self) -> None:
        for pid in descendants(self._root):
            now = _cpu_s(pid), _status("VmHWM", pid)
            old = self._seen.get(pid, (0.0, 0))
            self._seen[pid] = max(now[0], old[0]), max(now[1], old[1])

    @property
    def cost(self) -> tuple[float, float]:
        """Seconds of all, and MiB of the largest."""
        nothing = 0.0, 0
        grown = [
            (s - self._base.get(p, nothing)[0], m - self._base.get(p, nothing)[1]) for p, (s, m) in self._seen.items()
        ]
        return sum(max(0.0, s) for s, _ in grown), max((m for _, m in grown), default=0) / 1024


def descendants(root: int) -> list[int]:
    """Child processes of a process, and theirs."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                new = [int(one) for one in task.read_text().split()]
            except OSError:
                continue
            found += new
            waiting += new
    return found


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def _watch(child: int, read: int, copies: int, began: float) -> Cost:
    children, said, spent_s, warm_s, peak = _Children(child), b"", 0.0, 0.0, 0
    while True:
        ready, _, _ = select.select([read], [], [], LOOK_S)
        if ready:
            piece = os.read(read, 65536)
            if not said and piece:
                children.ignore_past()
                warm_s = _cpu_s(child)  # what comes before the work has only the wall clock's limit
            said += piece
            if not piece:
                break
        children.look()
        spent_s, peak = _cpu_s(child) - warm_s, _status("VmHWM", child)
        if time.monotonic() - began > KILL_WALL_S or (said and spent_s > KILL_CPU_S):
            break
    _end(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    own = said.partition(_READY)[2]
    elsewhere_s, elsewhere_mib = children.cost
    if own.endswith(b"}"):  # all was said, however the process ended then
        return replace(Cost(**json.loads(own)), child_cpu_s=elsewhere_s / copies, child_mib=elsewhere_mib)
    late = "" if spent_s > KILL_CPU_S else f" in {KILL_WALL_S:.0f} s"
    why = {2: "!! out of memory", 1: "!! the measurement failed"}.get(
        code, f"!! killed at {spent_s:.0f} s of CPU{late}"
    )
    return Cost(1e3 * spent_s, spent_s / copies, peak / 1024, why, elsewhere_s / copies, elsewhere_mib, True)


def _end(child: int) -> None:
    """End the measured process, and whatever it has started and left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
