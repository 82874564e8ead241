"""The supervisor: keeps one engine process running and passes commands to it.

It knows processes, pipes and back-off. It knows nothing of gRPC and never imports mlx, so an engine that a GPU fault
aborts takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio
import anyio.to_thread

from cluster.core.errors import BadFrame, MacpipeError, WorkerLost
from cluster.core.limits import (
    CONTROL_TIMEOUT_S,
    ENGINE_BACKOFF_S,
    ENGINE_SILENCE_S,
    ENGINE_START_SILENCE_S,
    ENGINE_START_TIMEOUT_S,
    ENGINE_STEADY_S,
    HEARTBEAT_S,
    LOAD_STALL_S,
    OVERLOADED_S,
    REPORT_TIMEOUT_S,
    STOP_GRACE_S,
)
from cluster.core.term_limits import FENCE_S
from cluster.membership.slowness import Alarms, Silence, extra_s
from cluster.platform.overload import Lag, no_lag, processor_seconds
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.exit_diagnosis import OutputTail, explain_exit, out_of_memory_kills
from cluster.worker.pipe_messages import (
    Begin,
    Command,
    CommandFailed,
    Done,
    Event,
    Fence,
    GetReport,
    Hello,
    Progress,
    Reported,
    pack,
    read,
    unpacker,
)

log = logging.getLogger(__name__)

_COMPUTING_SHARE = 0.02
"""Share of a processor. Answering reports and pings alone takes an engine 0.4 %."""
_BUSY_MS = 1000
"""During a longer step the supervisor checks whether the engine computes."""
_START_CHECKS = 20
"""How often the supervisor checks whether the daemon's first engine computes while it starts, ..."""
_LATER_START_CHECKS = 5
"""... and a later one. Each check of a Mac runs ``ps``."""


class Supervisor:
    """Runs ``python -m cluster.worker.engine``; ``hello`` is the running engine's description of itself.

    ``number`` is that of ``Begin``. A silent engine is not considered dead while it gets processor time, or while this
    machine is so overloaded (``lag``) that nothing can be expected of it.
    """

    def __init__(self, launcher: EngineLauncher, lag: Lag = no_lag, number: int = 0) -> None:
        self._launcher, self._number = launcher, number
        self._process: Process | None = None
        self._calls: dict[int, asyncio.Queue[Event | None]] = {}
        self._numbers = itertools.count(1)
        self.hello: Hello | None = None
        self.started = anyio.Event()
        self.restarts = 0
        self.problem = "the engine is starting"
        self._output_tail = OutputTail(sys.stderr.buffer)
        self._verdict = ""
        self._refusal: MacpipeError | None = None
        self._over = False
        self._lag = lag
        self._hangs = Alarms()
        self._last = Reported(0, 0, 0)
        self._slow = False
        """It did not answer its last report, but has an excuse."""
        self._hung_at_start = False
        """Whether the last engine was killed because it hung before it said hello."""
        self.computing = False
        """Whether a busy engine got processor time recently."""
        self._may_be_silent = False

    @property
    def has_work(self) -> bool:
        """Whether the engine's last report had live sequences or a job that is being computed."""
        return self._last.sequences > 0 or self._last.busy_ms > 0

    async def run(self) -> None:
        """Start the engine and restart it with back-off whenever it ends, until cancelled; then stop it.

        Raises the error with which the first engine fails to start, ``WorkerLost`` if it ends without one.
        """
        while True:
            began = time.monotonic()
            await self._run_once()
            if not self.started.is_set():
                raise self._refusal or WorkerLost(f"{self.problem} before it was ready")
            if time.monotonic() - began > ENGINE_STEADY_S:
                self.restarts = 0
            wait = ENGINE_BACKOFF_S[min(self.restarts, len(ENGINE_BACKOFF_S) - 1)]
            self.restarts += 1
            log.error("engine: ended, starting it again reason=%s wait_s=%.1f", self.problem, wait)
            await anyio.sleep(wait)

    async def run_once(self) -> None:
        """Run an engine until it ends or this is cancelled; then ``wait_started`` raises.

        One that hangs before it is ready is replaced once: it may have been a standby that hung unnoticed.
        """
        try:
            await self._run_once()
            if self._hung_at_start:
                log.error("engine: hung before it was ready, starting another one number=%d", self._number)
                await self._run_once()
        finally:
            self._over = True
            self.started.set()

    async def _run_once(self) -> None:
        self._verdict = ""
        self._slow = self._hung_at_start = self.computing = False
        kills = out_of_memory_kills()
        try:
            self._process = await self._launcher.take()
        except WorkerLost as e:
            self.problem = e.sentence
            return
        _send_begin(self._process, self._number)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._output_tail.follow, self._process)
                tasks.start_soon(self._watch, self._process)
                await self._read_events(self._process)
                code = await self._process.wait()
                await self._output_tail.wait_for_end()
                tasks.cancel_scope.cancel()
            memory_kills = out_of_memory_kills() - kills
            self.problem = self._verdict or explain_exit(code, self._output_tail.line, memory_kills)
        finally:
            with anyio.CancelScope(shield=True):
                await _stop(self._process)
            self.problem = self.problem or "the engine is stopping"
            self.hello = None
            self._end_calls()

    async def _watch(self, process: Process) -> None:
        """Kill an engine that does not answer reports any more: it hangs, or somebody stopped it."""
        await self._watch_start(process)
        silence, limit_s = Silence(), ENGINE_SILENCE_S * self._hangs.growth("", time.monotonic())
        while silence.seconds < limit_s:
            began = time.monotonic()
            had = await self._processor_seconds() if self._slow or self._last.busy_ms >= _BUSY_MS else None
            await anyio.sleep(HEARTBEAT_S)
            with suppress(WorkerLost):  # the engine has ended, which ``_run_once`` sees
                answer = await self._ask_report()
                elapsed_s = time.monotonic() - began
                self.computing = await self._has_computed_since(had, _COMPUTING_SHARE * elapsed_s)
                if answer or self._may_be_silent:
                    silence.end()
                else:
                    silence.add(elapsed_s, excused=self._slow)
        self._hangs.add("", time.monotonic())
        self._kill(process, f"the engine hung for {limit_s:.0f} s and was killed")

    async def _watch_start(self, process: Process) -> None:
        """Return once the engine has said hello. Kill it if it gets no processor time before.

        How long the daemon's first engine may take, ``wait_started`` decides.
        """
        if not self._number:
            await self.started.wait()
        silence = Silence()
        while self.hello is None:
            had, began = await self._processor_seconds(), time.monotonic()
            await anyio.sleep(ENGINE_START_SILENCE_S / _LATER_START_CHECKS)
            if await self._has_computed_since(had, 0.0):
                silence.end()
            else:
                silence.add(time.monotonic() - began, excused=False)
            if silence.seconds >= ENGINE_START_SILENCE_S + self._lag() and self.hello is None:
                self._hung_at_start = True
                self._kill(process, f"the engine hung for {silence.seconds:.0f} s before it was ready and was killed")
                return

    async def report(self) -> Reported:
        """Return the engine's report; the last known one if it is slow but alive.

        Raises ``WorkerLost`` if it is down, or silent without an excuse.
        """
        if self._may_be_silent and self.hello:
            return self._last
        slow = self._slow
        answer = await self._ask_report(HEARTBEAT_S if slow else REPORT_TIMEOUT_S)
        if answer is None and not self._slow:
            raise WorkerLost(f"its engine has not answered for {REPORT_TIMEOUT_S:.0f} s")
        return answer or self._last

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Expect no report during the block: the engine cannot answer, and whoever enters the block limits its time.

        Otherwise each of the worker's heartbeats would wait for the report, and the worker seem to be lost.
        """
        self._may_be_silent = True
        try:
            yield
        finally:
            self._may_be_silent = False

    async def _ask_report(self, timeout_s: float = REPORT_TIMEOUT_S) -> Reported | None:
        """Ask for a report; None if none arrives in time. Then the engine counts as slow if it has an excuse.

        The excuse is that it ran in the second half of that time: an engine that was stopped meanwhile ran in the
        first. Raises ``WorkerLost`` if it is down.
        """
        had = None
        async with self._call(GetReport(next(self._numbers))) as waiting:
            event = await self._wait_event(waiting, timeout_s / 2)
            if event is None:
                had = await self._processor_seconds()
                event = await self._wait_event(waiting, timeout_s / 2)
        if isinstance(event, Reported):
            self._last, self._slow = event, False
            return event
        if timeout_s >= REPORT_TIMEOUT_S:
            self._slow = self._lag() >= OVERLOADED_S or await self._has_computed_since(had, 0.0)
        return None

    async def _processor_seconds(self) -> float | None:
        process = self._process
        return await anyio.to_thread.run_sync(processor_seconds, process.pid) if process else None

    async def _has_computed_since(self, earlier_s: float | None, least_s: float) -> bool:
        """Return whether the engine got more than ``least_s`` of processor time since it had ``earlier_s``."""
        now_s = await self._processor_seconds() if earlier_s is not None else None
        return now_s is not None and earlier_s is not None and now_s - earlier_s > least_s

    def reset(self, why: str) -> None:
        """Kill the engine, if there is one. ``run`` starts it again."""
        if self._process and self._process.returncode is None:
            self._kill(self._process, f"the engine was killed: {why}")

    async def fence(self) -> None:
        """Return once the engine computes no frame of what is loaded; kill it if it does not stop in time."""
        engine, process = self.hello, self._process
        if engine is None or process is None:
            return  # an engine that has not said hello holds nothing
        limit_s = FENCE_S + extra_s(self._lag())
        try:
            async with asyncio.timeout(limit_s):
                await self.ask(Fence, limit_s)
        except (MacpipeError, TimeoutError):
            if self.hello is engine:
                self._kill(process, "the engine was killed: it did not stop computing for another coordinator")
            await process.wait()

    def _kill(self, process: Process, verdict: str) -> None:
        self._verdict = verdict
        with suppress(ProcessLookupError):
            process.kill()

    async def _read_events(self, process: Process) -> None:
        assert process.stdout
        stream = unpacker()
        try:
            while data := await process.stdout.read(65536):
                for event in read(stream, data):
                    self._handle_event(event)
        except BadFrame as e:
            self._kill(process, f"the engine was killed: {e.sentence}")

    def _handle_event(self, event: Begin | Command | Event) -> None:
        if isinstance(event, Hello):
            self.hello, self.problem = event, ""
            self.started.set()
        elif isinstance(event, CommandFailed) and not event.call:
            self._refusal = MacpipeError.of(event.reason, event.sentence)
        elif (waiting := self._calls.get(event.call)) and not isinstance(event, Begin | Command):
            waiting.put_nowait(event)

    def _end_calls(self) -> None:
        for waiting in self._calls.values():
            waiting.put_nowait(None)

    @asynccontextmanager
    async def _call(self, command: Command) -> AsyncIterator[asyncio.Queue[Event | None]]:
        process = self._process
        if self.hello is None or process is None or process.stdin is None:
            raise WorkerLost(self.problem)
        waiting: asyncio.Queue[Event | None] = asyncio.Queue()  # bounded by the one call's answers
        self._calls[command.call] = waiting
        try:
            with suppress(ConnectionError):
                process.stdin.write(pack(command))
            yield waiting
        finally:
            del self._calls[command.call]

    async def events(self, make: Callable[[int], Command], stall_s: float = LOAD_STALL_S) -> AsyncIterator[Progress]:
        """Send a command and yield its progress until it is done. ``make`` gets the call's number.

        Raises the error that the engine reports, and ``WorkerLost`` if it dies or is silent for ``stall_s``.
        """
        async with self._call(make(next(self._numbers))) as waiting:
            while not isinstance(event := await self._next(waiting, stall_s), Done):
                if isinstance(event, Progress):
                    yield event

    async def ask(self, make: Callable[[int], Command], timeout_s: float = CONTROL_TIMEOUT_S) -> Event:
        """Send a command that moves no weights and return its answer. Raises as ``events`` does."""
        async with self._call(make(next(self._numbers))) as waiting:
            return await self._next(waiting, timeout_s)

    async def _next(self, waiting: asyncio.Queue[Event | None], timeout_s: float) -> Event:
        """Wait for an answer, longer if the engine is slow but alive. Raises as ``events`` does."""
        silence = Silence()
        while (event := await self._wait_event(waiting, timeout_s)) is None:
            silence.add(timeout_s, excused=self._slow or self.computing or self._lag() >= OVERLOADED_S)
            if silence.seconds >= timeout_s:
                raise WorkerLost(f"its engine has not answered for {timeout_s:.0f} s")
        return event

    async def _wait_event(self, waiting: asyncio.Queue[Event | None], timeout_s: float) -> Event | None:
        """Return the next answer; None if none arrives in time. Raises as ``events`` does."""
        try:
            async with asyncio.timeout(timeout_s):
                event = await waiting.get()
        except TimeoutError:
            return None
        if event is None:
            raise WorkerLost(self.problem)
        if isinstance(event, CommandFailed):
            error = MacpipeError.of(event.reason, event.sentence)
            error.details |= {"epoch": event.epoch} if event.epoch else {}
            raise error
        return event

    async def wait_started(self) -> None:
        """Return once an engine has said hello.

        Raises ``WorkerLost`` if none does in time, or the error with which the only one ends before.
        """
        silence = Silence()
        interval_s = ENGINE_START_TIMEOUT_S / _START_CHECKS
        while silence.seconds < ENGINE_START_TIMEOUT_S:
            had = await self._processor_seconds()
            with anyio.move_on_after(interval_s):
                await self.started.wait()
                if self._over:
                    raise self._refusal or WorkerLost(f"{self.problem} before it was ready")
                return
            silence.add(interval_s, excused=await self._has_computed_since(had, 0.0) or self._lag() >= OVERLOADED_S)
        raise WorkerLost(f"the engine did not start within {ENGINE_START_TIMEOUT_S:.0f} s: {self.problem}")


def _send_begin(process: Process, number: int) -> None:
    assert process.stdin
    with suppress(ConnectionError):  # it has ended already, which is handled as any other end
        process.stdin.write(pack(Begin(number=number)))


async def _stop(process: Process) -> None:
    """Close the pipe, which asks the engine to end; kill it if it does not end in time."""
    if process.returncode is not None:
        return
    if process.stdin:
        process.stdin.close()
    with anyio.move_on_after(STOP_GRACE_S):
        await process.wait()
        return
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
