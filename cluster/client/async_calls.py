"""gRPC calls and background work over asyncio. It has the same names as ``cluster.client.calls``, but for ``Async``.

Only these two modules are written twice: ``ops/clients`` generates the rest of the blocking client from the asyncio
one.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import grpc
from grpc import aio

from cluster.client.deadlines import translate_errors
from cluster.core.errors import Aborted
from cluster.security.trust import ChannelOptions
from cluster.v1 import cluster_pb2_grpc, inference_pb2_grpc

if TYPE_CHECKING:  # grpc's classes are subscriptable only for type checkers
    UnaryMethod = aio.UnaryUnaryMultiCallable
    StreamMethod = aio.UnaryStreamMultiCallable

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")


class AsyncStubs:
    """A channel and the stubs of the public services on it. It belongs to the running event loop."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials, options: ChannelOptions) -> None:
        self.address = address
        self._channel = aio.secure_channel(address, credentials, options=options)
        self.inference: inference_pb2_grpc.InferenceServiceAsyncStub
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel. Running calls end with Aborted."""
        await self._channel.close(grace=None)


class AsyncUnaryCall(Generic[R]):
    """A started call with one reply. It keeps its channel open."""

    def __init__(self, stubs: AsyncStubs, method: UnaryMethod[Q, R], request: Q, timeout_s: float | None) -> None:
        self._stubs = stubs
        self.address = stubs.address
        self._call = method(request, timeout=timeout_s)

    async def wait(self) -> R:
        """Return the reply. Raise the call's MacpipeError, and cancel the call if the wait is interrupted."""
        with translate_errors(self._stubs.address):
            return await _await_uncancelled(self._call, self._stubs.address)


class AsyncStreamCall(Generic[R]):
    """A started call with a stream of replies. It keeps its channel open."""

    def __init__(self, stubs: AsyncStubs, method: StreamMethod[Q, R], request: Q, timeout_s: float | None) -> None:
        self._stubs = stubs
        self.address = stubs.address
        self._call = method(request, timeout=timeout_s)

    async def read(self, within_s: float | None = None) -> R | None:
        """Return the next reply, or None after the last. Raise the call's MacpipeError.

        Cancel the call and raise TimeoutError after ``within_s`` seconds without a reply.
        """
        with translate_errors(self._stubs.address):
            async with asyncio.timeout(within_s):
                reply: Any = await _await_uncancelled(self._call.read(), self._stubs.address)
        return None if reply is aio.EOF else reply  # type: ignore[attr-defined]  # its typing stub lacks EOF

    def cancel(self) -> None:
        """Cancel the call. Do nothing once it has ended."""
        self._call.cancel()


class AsyncPause:
    """Waits that end early once ``end`` is called."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    async def wait(self, seconds: float) -> bool:
        """Wait. Return whether the pauses were ended."""
        if seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ended.wait()
        return self._ended.is_set()

    def end(self) -> None:
        """End this wait and all later ones."""
        self._ended.set()


class AsyncRepeater:
    """Runs the method ``work`` in the task ``name`` until stopped. ``work`` returns the seconds until its next run.

    When the object of ``work`` is deleted, the task ends within ``longest_s`` seconds.
    """

    def __init__(self, name: str, work: Callable[[], Coroutine[Any, Any, float]], longest_s: float) -> None:
        self._name = name
        self._work = weakref.WeakMethod(work)
        self._longest_s = longest_s
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. Do nothing if it was started before."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self, within_s: float) -> None:
        """End after the current run, or after ``within_s`` seconds."""
        self._stopping.set()
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=within_s)
            self._task.cancel()

    async def _run(self) -> None:
        while (work := self._work()) is not None:
            wait_s = await work()
            del work  # or the wait would keep its object alive
            with suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, self._longest_s)):
                    await self._stopping.wait()
                return


async def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that may block, in a thread."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def _await_uncancelled(reply: Awaitable[R], address: str) -> R:
    """Await ``reply``. Raise Aborted if the call was cancelled but this task was not.

    grpc.aio raises CancelledError in both cases, but only a cancelled task may unwind its task group.
    """
    try:
        return await reply
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Aborted(f"the call to the coordinator at {address} was cancelled") from None
