"""Runs jobs in a bounded pool of sandbox processes for one model, and queues jobs while all are busy.

A process that a job has killed is replaced at once, so that the next job waits at most for a process start.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import anyio

from cluster.core.errors import Busy, MacpipeError, NotServing
from cluster.core.limits import RETRY_AFTER_S
from cluster.sandbox.job_messages import Job, Reply
from cluster.sandbox.limits import MAX_SANDBOX_WAITING, SANDBOX_GROW_S, SANDBOX_PROCESSES, SANDBOX_WAIT_S
from cluster.sandbox.process import SandboxProcess

__all__ = ["ProcessPool"]

T = TypeVar("T")


class ProcessPool:
    """Runs jobs in at most ``size`` processes, each of which runs the jobs ``opening`` first. Uses one event loop.

    Processes start on demand: another one starts when a job has waited for ``SANDBOX_GROW_S`` and none is starting. At
    most ``waiting`` jobs wait; further jobs are rejected with ``Busy``.
    """

    def __init__(
        self, opening: Sequence[Job], size: int = SANDBOX_PROCESSES, waiting: int = MAX_SANDBOX_WAITING
    ) -> None:
        self._opening = opening
        self._size = size
        self._max_waiting = waiting
        self._processes: set[SandboxProcess] = set()
        """Processes that have opened the model."""
        self._opening_now: set[SandboxProcess] = set()
        self._starting = 0
        """Number of processes that are starting or opening the model."""
        self._idle: list[SandboxProcess] = []
        self._waiting: deque[asyncio.Future[SandboxProcess]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the ids of the live processes, including those that are opening the model."""
        return tuple(process.pid for process in self._processes | self._opening_now if process.alive)

    async def open(self, process: SandboxProcess | None = None) -> None:
        """Open the model in a first process: ``process`` if given, else a new one. Raises ``BadCheckpoint``."""
        self._starting += 1
        await self._launch(process)

    async def run(self, job: Job) -> Reply:
        """Run ``job`` when a process is free. If the caller is cancelled, the job continues within its limits.

        Raises the errors of ``SandboxProcess.run``, ``Busy`` if too many jobs wait or this one waits too long, and
        ``NotServing`` if the pool is closed.
        """
        process = await self._acquire()
        return await asyncio.shield(self._spawn(self._work(process, job)))

    async def close(self) -> None:
        """Kill every process. Running and waiting jobs fail with ``NotServing``."""
        self._closed = True
        self._fail_waiting(_closed_error())
        async with anyio.create_task_group() as tasks:
            for process in self._processes | self._opening_now:
                tasks.start_soon(process.stop)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, process: SandboxProcess, job: Job) -> Reply:
        try:
            return await process.run(job)
        finally:
            self._release(process)

    async def _acquire(self) -> SandboxProcess:
        if self._closed:
            raise _closed_error()
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            self._processes.discard(process)
        if len(self._waiting) >= self._max_waiting:
            raise Busy(
                f"{self._max_waiting} requests are waiting to be tokenized; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        waiting: asyncio.Future[SandboxProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await self._wait(waiting)
        except BaseException:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._release(waiting.result())  # a process was assigned while the caller was cancelled
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(waiting)

    async def _wait(self, waiting: asyncio.Future[SandboxProcess]) -> SandboxProcess:
        if not self._processes and not self._starting:
            self._grow()
        done, _ = await asyncio.wait((waiting,), timeout=SANDBOX_GROW_S)
        if not done:
            if not self._starting:
                self._grow()
            await asyncio.wait((waiting,), timeout=SANDBOX_WAIT_S)
        if not waiting.done():
            raise Busy(
                f"the request waited {SANDBOX_WAIT_S:.0f} s to be tokenized; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        return waiting.result()

    def _release(self, process: SandboxProcess) -> None:
        """Give ``process`` to the job that has waited longest. If it is dead, replace it."""
        if not process.alive:
            self._processes.discard(process)
            self._grow()
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(process)
                return
        self._idle.append(process)

    def _grow(self) -> None:
        """Start another process unless the pool is full or closed."""
        if not self._closed and len(self._processes) + self._starting < self._size:
            self._starting += 1
            self._spawn(self._launch(None))

    async def _launch(self, process: SandboxProcess | None) -> None:
        """Open the model in ``process``, or in a new process if it is None, and add it to the pool."""
        try:
            process = process or await SandboxProcess.start()
            await self._open(process)
        except MacpipeError as error:
            self._fail_waiting_without_processes(error)
            raise
        finally:
            self._starting -= 1
        self._processes.add(process)
        if self._closed:
            await process.stop()
        self._release(process)

    async def _open(self, process: SandboxProcess) -> None:
        self._opening_now.add(process)
        try:
            for job in self._opening:
                await process.run(job)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await process.stop()
            raise
        finally:
            self._opening_now.discard(process)

    def _fail_waiting_without_processes(self, error: MacpipeError) -> None:
        """Fail the waiting jobs with ``error`` if the pool has no other process."""
        if not self._processes:
            self._fail_waiting(error)

    def _fail_waiting(self, error: MacpipeError) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: the waiting caller has already received it


def _closed_error() -> NotServing:
    return NotServing("the model was unloaded while the request was being tokenized; send it again")
