"""One sandbox process, as its parent sees it: one job at a time, and no job lasts.

The process ends itself where a job exceeds its CPU time. The parent ends it where a job exceeds its wall time, or its
memory, which the parent watches: not every system limits that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from subprocess import Popen, TimeoutExpired
from typing import Final

import anyio

from cluster.core.errors import BadFrame, Busy, MacpipeError, NotServing
from cluster.core.limits import MEMORY_WATCH_S, MIB, RETRY_AFTER_S, SANDBOX_MEMORY_BYTES
from cluster.platform.process import isolated_environment
from cluster.sandbox.failures import CRASHED, cpu_exceeded, job_error, memory_exceeded
from cluster.sandbox.job_messages import HEADER, Job, JobFailed, Reply, pack_job, payload_size, unpack_reply
from cluster.sandbox.memory import resident_bytes

__all__ = ["SandboxProcess"]

QUIET: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""A job is one thread's work, and nobody is told which libraries are not installed."""

END_S: Final = 2.0
"""What a process gets to end that was killed or has closed its socket."""


class SandboxProcess:
    """A ``python -m cluster.sandbox.child``, and the socket that is its stdin and stdout.

    asyncio's own processes are of no use here: where starting one is cancelled, or one is killed whose answer is only
    half read, asyncio waits for ever.
    """

    def __init__(self, child: Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._child, self._reader, self._writer = child, reader, writer
        self._resident = 0
        """Bytes that it held after its first job, or after the last long one."""
        self._initial = 0
        """Bytes that it held after its first job."""
        self._was_watched = False
        """The job took long enough for a look at its memory."""
        self._verdict: str | None = None
        """Why this parent has killed it, for ``job_error``."""
        self._stopped = False

    @staticmethod
    async def start() -> SandboxProcess:
        """Start a process. It imports its libraries first; a job that is sent meanwhile waits.

        Raises ``Busy`` where this machine can start no more processes.
        """
        try:
            child, ours = _spawn()
        except OSError as error:
            raise Busy(f"no process can be started: {error.strerror}", retry_after_s=RETRY_AFTER_S) from error
        try:
            return SandboxProcess(child, *await asyncio.open_unix_connection(sock=ours, limit=MIB))
        except BaseException:
            child.kill()
            child.wait()
            ours.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return self._child.poll() is None and self._verdict is None

    @property
    def pid(self) -> int:
        return self._child.pid

    async def run(self, job: Job) -> Reply:
        """Do ``job``; returns when it is done or dead, even where nobody waits for it any more.

        Raises what the job raises; where it exceeds a limit or crashes, the ``job_error`` that says so; ``Busy`` where
        it does not get its CPU time within its wall time; and ``BadFrame`` for a job too large to send. See ``alive``
        for what is left of the process.
        """
        message = pack_job(job)
        watch = asyncio.create_task(self._watch_memory(job))
        try:
            async with asyncio.timeout(job.limits.wall_s):
                reply = await self._exchange(message)
        except TimeoutError:
            await self._kill("")
            raise Busy(
                f"this machine is overloaded: within {job.limits.wall_s:.0f} s a job did not get "
                f"{job.limits.cpu_s:.1f} s of CPU time; try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        except (OSError, EOFError, BadFrame):
            await anyio.to_thread.run_sync(self._reap)  # so that it is known what ended it
            await self._kill("")
            raise self._ended(job) from None
        finally:
            watch.cancel()
        if not self._resident or self._was_watched:
            await self._measure()
        if isinstance(reply, JobFailed):
            error = MacpipeError.of(reply.reason, reply.sentence)
            error.field = reply.field
            raise error
        return reply

    async def stop(self) -> None:
        """Kill it. A job that it has fails with ``NotServing``."""
        self._stopped = True
        await self._kill("")

    async def _exchange(self, message: bytes) -> Reply:
        self._writer.write(message)
        await self._writer.drain()
        header = await self._reader.readexactly(HEADER.size)
        return unpack_reply(await self._reader.readexactly(payload_size(header)))

    async def _measure(self) -> None:
        """Find out what the process holds between jobs. One that keeps too much of a job's memory is ended."""
        self._resident = await anyio.to_thread.run_sync(resident_bytes, self.pid)
        self._initial = self._initial or self._resident
        if self._resident > self._initial + SANDBOX_MEMORY_BYTES:
            await self._kill("")

    async def _watch_memory(self, job: Job) -> None:
        self._was_watched = False
        while True:
            await asyncio.sleep(MEMORY_WATCH_S)
            self._was_watched = True
            held = await anyio.to_thread.run_sync(resident_bytes, self.pid)
            if held > self._resident + job.limits.memory_bytes:
                await self._kill(memory_exceeded(job.limits))

    async def _kill(self, verdict: str) -> None:
        if self._child.poll() is None:
            self._verdict = self._verdict or verdict
            self._child.kill()
        self._writer.transport.abort()
        await anyio.to_thread.run_sync(self._reap)

    def _reap(self) -> None:
        """Wait until a process has ended that was killed, or has closed its socket: that takes a moment at most."""
        with suppress(TimeoutExpired):
            self._child.wait(END_S)

    def _ended(self, job: Job) -> MacpipeError:
        """The error of a job in whose midst the process has ended."""
        if self._stopped:
            return NotServing("the model was unloaded while the request was read; send it again")
        if self._verdict:
            return job_error(job, self._verdict)
        code = self._child.returncode or 0
        if code == -signal.SIGPROF:
            return job_error(job, cpu_exceeded(job.limits))
        if code == -signal.SIGABRT:
            return job_error(job, f"{CRASHED}, or {memory_exceeded(job.limits)}")
        return job_error(job, CRASHED)


def _spawn() -> tuple[Popen[bytes], socket.socket]:
    """Start a child; its process and our end of its socket. Raises OSError."""
    environment = {**isolated_environment(os.environ), **QUIET}
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            command = (sys.executable, "-m", "cluster.sandbox.child")
            return Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment), ours
        except OSError:
            ours.close()
            raise
