"""The asynchronous twins of ``cluster.client.streams``: the same objects, and await where those wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from cluster.client.cluster_state import ClusterState
from cluster.client.deadlines import STALL_TIMEOUT_S, failures_told, require_serving, stall_error
from cluster.client.proto_decoding import load_event
from cluster.client.results import Completion, Prompt, Token
from cluster.client.transcript import Transcribed
from cluster.core.errors import Aborted
from cluster.core.plan import LoadProgress
from cluster.v1 import cluster_pb2, inference_pb2

if TYPE_CHECKING:  # grpc's classes are generic for type checkers alone
    from grpc import aio

    AnswerCall = (
        aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
        | aio.UnaryStreamCall[inference_pb2.ChatRequest, inference_pb2.ChatResponse]
        | aio.UnaryStreamCall[inference_pb2.ResumeRequest, inference_pb2.GenerateResponse]
    )
    LoadCall = aio.UnaryStreamCall[cluster_pb2.LoadModelRequest, cluster_pb2.LoadModelResponse]

T = TypeVar("T")


class AsyncStream(Transcribed):
    """An answer on its way: iterate over it with ``async for`` for its tokens.

    Leaving the ``async with`` block before the end cancels the call, all the way down to the workers; so does leaving
    the loop, as soon as the event loop runs again. Iterating raises the MacpipeError that ended the answer early; an
    answer that ends without one is whole.
    """

    def __init__(self, call: AnswerCall, address: str, offset: int | Sequence[int] = 0) -> None:
        super().__init__(offset)
        self._call = call
        self._address = address

    async def wait_accepted(self) -> Prompt:
        """Wait for the coordinator to accept the request; raises the MacpipeError with which it refused."""
        while self._transcript.prompt is None:
            await self._advance()
        return self._transcript.prompt

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The tokens as they come. The last words may be in ``finish.text``: ``texts`` has them all."""
        try:
            while (tokens := await self._advance()) is not None:
                for token in tokens:
                    yield token
        finally:
            self.cancel()

    async def texts(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece as it becomes printable; together they are ``completion().text``."""
        try:
            async for token in self:
                if token.text and token.sample == 0:
                    yield token.text
        finally:
            self.cancel()
        if self.finish and self.finish.text:
            yield self.finish.text

    async def completion(self) -> Completion:
        """Wait for the end; returns the whole answer, with the tokens that were already taken from here."""
        async for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """End the call now; who waits for a token gets Aborted. Does nothing once the answer is complete."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cancel()

    async def _advance(self) -> tuple[Token, ...] | None:
        """The tokens of the next event; None once the stream has ended as it should."""
        with failures_told(self._address):
            reply = await _read_uncancelled(self._call.read(), self._address)
        if isinstance(reply, (inference_pb2.GenerateResponse, inference_pb2.ChatResponse)):
            return self._transcript.accept(reply)
        self._transcript.close()
        return None


class AsyncLoading:
    """A load on its way: iterate for LoadProgress of each stage and, last, the ClusterState; or ``await wait()``.

    Leaving the loop early cancels the load. Raises DeadlineExceeded when nothing is heard for ``stall_s`` seconds.
    """

    def __init__(self, call: LoadCall, address: str, stall_s: float = STALL_TIMEOUT_S) -> None:
        self._call = call
        self._address = address
        self._stall_s = stall_s

    async def __aiter__(self) -> AsyncIterator[LoadProgress | ClusterState]:
        event = None
        try:
            while (coming := await self._next_event()) is not None:
                event = coming
                yield event
        finally:
            self.cancel()
        require_serving(event)

    async def wait(self) -> ClusterState:
        """Wait for the end; returns the cluster's state once it serves."""
        last = None
        async for event in self:
            last = event
        return require_serving(last)

    def cancel(self) -> None:
        """Give the load up. Does nothing once it is done."""
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
    """Await ``read``; raises Aborted where the call was cancelled but this task was not.

    Grpc.aio raises CancelledError for both, and only the second may unwind a task group.
    """
    try:
        return await read
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Aborted(f"the call to the coordinator at {address} was cancelled") from None
