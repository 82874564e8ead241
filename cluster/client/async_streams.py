"""The asyncio client's streams. They have the same methods as those in ``cluster.client.streams``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from cluster.client.deadlines import STALL_TIMEOUT_S, failures_told, require_serving, stall_error
from cluster.client.proto_decoding import load_event
from cluster.client.results import Completion, Prompt, Token
from cluster.client.transcript import Transcribed
from cluster.core.cluster_state import ClusterState
from cluster.core.errors import Aborted
from cluster.core.plan import LoadProgress
from cluster.v1 import cluster_pb2, inference_pb2

if TYPE_CHECKING:  # grpc's classes are subscriptable only for type checkers
    from grpc import aio

    AnswerCall = (
        aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
        | aio.UnaryStreamCall[inference_pb2.ChatRequest, inference_pb2.ChatResponse]
        | aio.UnaryStreamCall[inference_pb2.ResumeRequest, inference_pb2.GenerateResponse]
    )
    LoadCall = aio.UnaryStreamCall[cluster_pb2.LoadModelRequest, cluster_pb2.LoadModelResponse]

T = TypeVar("T")


class AsyncStream(Transcribed):
    """An answer in progress: iterate over it with ``async for`` to get its tokens.

    Leaving the ``async with`` block early cancels the call, down to the workers. Leaving the loop early does the same
    as soon as the event loop runs again. Iterating raises the MacpipeError that ended the answer early. An answer that
    ends without an error is complete.
    """

    def __init__(self, call: AnswerCall, address: str, offset: int | Sequence[int] = 0) -> None:
        super().__init__(offset)
        self._call = call
        self._address = address

    async def wait_accepted(self) -> Prompt:
        """Wait until the coordinator accepts the request. Raise its MacpipeError if it refuses."""
        while self._transcript.prompt is None:
            await self._advance()
        return self._transcript.prompt

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Yield tokens as they arrive. The last text may be in ``finish.text`` only; ``texts`` yields all of it."""
        try:
            while (tokens := await self._advance()) is not None:
                for token in tokens:
                    yield token
        finally:
            self.cancel()

    async def texts(self) -> AsyncIterator[str]:
        """Yield the answer's text as it becomes printable. The pieces add up to ``completion().text``."""
        try:
            async for token in self:
                if token.text and token.sample == 0:
                    yield token.text
        finally:
            self.cancel()
        if self.finish and self.finish.text:
            yield self.finish.text

    async def completion(self) -> Completion:
        """Wait for the end. Return the whole answer, including tokens that were already iterated over."""
        async for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """Cancel the call; a reader waiting for a token gets Aborted. Do nothing once the answer is complete."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cancel()

    async def _advance(self) -> tuple[Token, ...] | None:
        """Return the tokens of the next event, or None after a complete answer."""
        with failures_told(self._address):
            reply = await _read_uncancelled(self._call.read(), self._address)
        if isinstance(reply, (inference_pb2.GenerateResponse, inference_pb2.ChatResponse)):
            return self._transcript.accept(reply)
        self._transcript.close()
        return None


class AsyncLoading:
    """A load in progress: iterate for the LoadProgress of each stage and a final ClusterState, or ``await wait()``.

    Leaving the loop early cancels the load. Raises DeadlineExceeded after ``stall_s`` seconds without an event.
    """

    def __init__(self, call: LoadCall, address: str, stall_s: float = STALL_TIMEOUT_S) -> None:
        self._call = call
        self._address = address
        self._stall_s = stall_s

    async def __aiter__(self) -> AsyncIterator[LoadProgress | ClusterState]:
        event = None
        try:
            while (following := await self._next_event()) is not None:
                event = following
                yield event
        finally:
            self.cancel()
        require_serving(event)

    async def wait(self) -> ClusterState:
        """Wait for the end. Return the cluster's state once it serves."""
        last = None
        async for event in self:
            last = event
        return require_serving(last)

    def cancel(self) -> None:
        """Cancel the load. Do nothing once it is done."""
        self._call.cancel()

    async def _next_event(self) -> LoadProgress | ClusterState | None:
        try:
            with failures_told(self._address):
                async with asyncio.timeout(self._stall_s):
                    reply = await _read_uncancelled(self._call.read(), self._address)
        except TimeoutError:
            raise stall_error(self._stall_s) from None
        return load_event(reply) if isinstance(reply, cluster_pb2.LoadModelResponse) else None


async def _read_uncancelled(read: Awaitable[T], address: str) -> T:
    """Await ``read``. Raise Aborted if the call was cancelled but this task was not.

    grpc.aio raises CancelledError in both cases, but only a cancelled task may unwind its task group.
    """
    try:
        return await read
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Aborted(f"the call to the coordinator at {address} was cancelled") from None
