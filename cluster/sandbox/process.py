"""Controls one sandbox process from its parent: one job at a time, each within its limits.

The process kills itself if a job exceeds its CPU time. The parent kills it if a job exceeds its wall time or its
memory. The parent watches the memory because not every system can limit it.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Final

import anyio

from cluster.core.errors import BadFrame, Busy, MacpipeError, NotServing
from cluster.core.limits import RETRY_AFTER_S
from cluster.platform.process import resident_bytes
from cluster.sandbox.child_process import ChildProcess
from cluster.sandbox.failures import CRASHED, cpu_exceeded, job_error, memory_exceeded
from cluster.sandbox.job_messages import Job, JobFailed, Reply, pack_job, payload_size, unpack_reply
from cluster.sandbox.limits import MEMORY_WATCH_S, SANDBOX_MEMORY_BYTES

__all__ = ["SandboxProcess"]

QUIET: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Makes each job single-threaded and suppresses warnings about missing libraries."""


class SandboxProcess:
    """A ``python -m cluster.sandbox.child`` process, and what is known of its memory."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._resident = 0
        """Resident bytes after the first job or after the last long one."""
        self._initial = 0
        """Resident bytes after the first job."""
        self._was_watched = False
        """Whether the job took long enough for a measurement of its memory."""
        self._verdict: str | None = None
        """Why the parent has killed the process, for ``job_error``; None if it has not."""
        self._stopped = False

    @staticmethod
    async def start() -> SandboxProcess:
        """Start a process. A job that is sent while it still imports its libraries waits.

        Raises ``Busy`` if this machine cannot start another process.
        """
        return SandboxProcess(await ChildProcess.start("cluster.sandbox.child", QUIET, "a sandbox process"))

    @property
    def alive(self) -> bool:
        """Return whether the process can run a job."""
        return self._child.running and self._verdict is None

    @property
    def pid(self) -> int:
        """Return the id of the process."""
        return self._child.pid

    async def run(self, job: Job) -> Reply:
        """Run ``job`` and return its reply, or raise once it has failed or the process has died.

        Raises the job's own errors, ``job_error`` if it exceeds a limit or crashes, ``Busy`` if it does not get its CPU
        time within its wall time, and ``BadFrame`` if it is too large to send. ``alive`` tells afterwards whether the
        process can still be used.
        """
        message = await anyio.to_thread.run_sync(pack_job, job)  # 50 ms for the longest conversations
        watch = asyncio.create_task(self._watch_memory(job))
        try:
            async with asyncio.timeout(job.limits.wall_s):
                reply = await self._exchange(message)
        except TimeoutError:
            await self._kill("")
            raise Busy(
                f"this machine is overloaded: a job did not get {job.limits.cpu_s:.1f} s of CPU time within "
                f"{job.limits.wall_s:.0f} s; try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        except (OSError, EOFError, BadFrame):
            await self._child.wait()  # the exit code tells why the process ended
            await self._kill("")
            raise self._diagnose_exit(job) from None
        finally:
            watch.cancel()
        if not self._resident or self._was_watched:
            await self._measure()
        if isinstance(reply, JobFailed):
            error = MacpipeError.of(reply.reason, reply.sentence)
            error.field = reply.field
            error.details = reply.details
            raise error
        return reply

    async def stop(self) -> None:
        """Kill the process. A running job fails with ``NotServing``."""
        self._stopped = True
        await self._kill("")

    async def _exchange(self, message: bytes) -> Reply:
        await self._child.send(message)
        return unpack_reply(await self._child.receive(payload_size))

    async def _measure(self) -> None:
        """Measure the memory that the process holds between jobs. Kill it if it keeps too much of a job's memory."""
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
        if self._child.running:
            self._verdict = self._verdict or verdict
        await self._child.end()

    def _diagnose_exit(self, job: Job) -> MacpipeError:
        """Return the error of a job during which the process ended."""
        if self._stopped:
            return NotServing("the model was unloaded while the request was being tokenized; send it again")
        if self._verdict:
            return job_error(job, self._verdict)
        code = self._child.exit_code or 0
        if code == -signal.SIGPROF:
            return job_error(job, cpu_exceeded(job.limits))
        if code == -signal.SIGABRT:
            return job_error(job, f"{CRASHED}, or {memory_exceeded(job.limits)}")
        return job_error(job, CRASHED)
