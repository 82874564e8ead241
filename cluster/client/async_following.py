"""The asyncio client's calls to a service that may move to another coordinator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from cluster.client.async_calls import AsyncPause, AsyncStreamCall, AsyncStubs
from cluster.client.async_connection import AsyncCoordinatorConnection
from cluster.client.follow_schedule import FollowSchedule, is_elsewhere, never_sent
from cluster.client.received_answer import ReceivedAnswer, Reply
from cluster.core.errors import Aborted, AnswerLost, DeadlineExceeded, MacpipeError, RequestNotFound
from cluster.v1 import inference_pb2

if TYPE_CHECKING:
    from cluster.client.async_calls import StreamMethod

Q = TypeVar("Q")
R = TypeVar("R")
AnswerCall: TypeAlias = AsyncStreamCall[inference_pb2.GenerateResponse] | AsyncStreamCall[inference_pb2.ChatResponse]


class AsyncFoundCall(Generic[R]):
    """A call with a stream of replies that begins at the first address where a coordinator answers.

    It starts when it is read, and is not repeated: it may have changed something.
    """

    def __init__(
        self, connection: AsyncCoordinatorConnection, choose: Callable[[AsyncStubs], StreamMethod[Q, R]], request: Q
    ) -> None:
        self._connection = connection
        self._choose, self._request = choose, request
        self._call: AsyncStreamCall[R] | None = None
        self._cancelled = False

    async def read(self, within_s: float | None = None) -> R | None:
        """Return the next reply, as ``AsyncStreamCall.read`` does. Raise also the error of the search."""
        if self._call is None:
            await self._connection.find_leader()
            if self._cancelled:
                raise Aborted("the call was cancelled")
            self._call = self._connection.stream(self._choose, self._request)
        return await self._call.read(within_s)

    def cancel(self) -> None:
        """Cancel the call. Do nothing once it has ended."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()


class AsyncFollowedAnswer:
    """An answer that continues at another coordinator if the call breaks.

    ``begin`` sends the request, with the given timeout in seconds. ``timeout_s`` is the deadline of the whole answer.
    ``offset``: an answer that was begun earlier is resumed there.
    """

    def __init__(
        self,
        connection: AsyncCoordinatorConnection,
        request_id: str,
        begin: Callable[[float | None], AnswerCall],
        timeout_s: float | None,
        offset: int | Sequence[int] | None = None,
    ) -> None:
        self._connection, self._begin = connection, begin
        self._is_new = offset is None
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._progress = ReceivedAnswer(request_id, offset or 0)
        self._schedule = FollowSchedule(len(connection.addresses))
        self._pause = AsyncPause()
        self._perhaps_sent = not self._is_new
        self._call = begin(timeout_s)

    async def read(self) -> Reply | None:
        """Return the next reply, or None after the last. Raise the MacpipeError that ends the answer."""
        while True:
            try:
                reply = await self._call.read()
            except MacpipeError as error:
                await self._follow(error)
                continue
            if reply is None:
                return None
            new = self._progress.take(reply)
            if new is not None:
                self._schedule.reset()
                return new

    def cancel(self) -> None:
        """Cancel the call. Do nothing once it has ended."""
        self._pause.end()
        self._call.cancel()

    async def _follow(self, error: MacpipeError) -> None:
        """Have the answer continued, here or at another address. Raise ``error`` if it is the answer's end."""
        if isinstance(error, RequestNotFound | AnswerLost) and self._is_new and not self._progress.accepted:
            self._call = self._begin(self._left_s())  # no coordinator that leads has it
            return
        pause_s = self._schedule.pause_s(error, patient=self._progress.accepted)
        if pause_s is None:
            self._schedule.end(error)
        if is_elsewhere(error):
            self._connection.leave(self._call.address)
        if await self._pause.wait(pause_s):
            raise Aborted("the call was cancelled") from error
        self._perhaps_sent = self._perhaps_sent or not never_sent(error)
        if self._perhaps_sent:
            request = self._progress.resume_request()
            self._call = self._connection.stream(lambda to: to.inference.Resume, request, self._left_s())
        else:
            self._call = self._begin(self._left_s())

    def _left_s(self) -> float | None:
        """Return the seconds until the deadline. Raise DeadlineExceeded if it has passed."""
        if self._deadline is None:
            return None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed while the client looked for a coordinator")
        return left_s
