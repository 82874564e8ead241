"""The asyncio client's streams: the tokens of an answer, and the progress of a load.

Each owns one gRPC call and cancels it when the caller stops iterating, so that the workers stop computing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from cluster.client.async_calls import AsyncStreamCall
from cluster.client.async_following import AsyncFollowedAnswer, AsyncFoundCall
from cluster.client.deadlines import STALL_TIMEOUT_S, require_serving, stall_error
from cluster.client.proto_decoding import decode_load_event
from cluster.client.results import AcceptedRequest, Completion, Token
from cluster.client.transcript import PartialAnswer
from cluster.core.cluster_state import ClusterState
from cluster.core.plan import LoadProgress
from cluster.v1 import cluster_pb2

LoadCall = AsyncStreamCall[cluster_pb2.LoadModelResponse] | AsyncFoundCall[cluster_pb2.LoadModelResponse]


class AsyncStream(PartialAnswer):
    """An answer in progress: iterate over it with ``async for`` to get its tokens.

    Leaving the ``async with`` block early cancels the call, down to the workers. Leaving the loop early does the same
    as soon as the event loop runs again. Iterating raises the MacpipeError that ended the answer early. An answer that
    ends without an error is complete.
    """

    def __init__(self, call: AsyncFollowedAnswer, offset: int | Sequence[int] = 0) -> None:
        super().__init__(offset)
        self._call = call

    async def wait_accepted(self) -> AcceptedRequest:
        """Wait until the coordinator accepts the request. Raise its MacpipeError if it refuses."""
        while self._transcript.accepted is None:
            await self._advance()
        return self._transcript.accepted

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
        reply = await self._call.read()
        if reply is not None:
            return self._transcript.add_event(reply)
        self._transcript.close()
        return None


class AsyncLoading:
    """A load in progress: iterate for the LoadProgress of each stage and a final ClusterState, or ``await wait()``.

    Leaving the loop early cancels the load. Raises DeadlineExceeded after ``stall_s`` seconds without an event.
    """

    def __init__(self, call: LoadCall, stall_s: float = STALL_TIMEOUT_S) -> None:
        self._call = call
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
            reply = await self._call.read(self._stall_s)
        except TimeoutError:
            raise stall_error(self._stall_s) from None
        return None if reply is None else decode_load_event(reply)
