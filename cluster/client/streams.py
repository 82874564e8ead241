# Generated from async_streams.py by ops/clients. Edit that file, then run ops/clients.
"""The blocking client's streams: the tokens of an answer, and the progress of a load.

Each owns one gRPC call and cancels it when the caller stops iterating, so that the workers stop computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from cluster.client.calls import StreamCall
from cluster.client.deadlines import STALL_TIMEOUT_S, require_serving, stall_error
from cluster.client.following import FollowedAnswer, FoundCall
from cluster.client.proto_decoding import decode_load_event
from cluster.client.results import AcceptedRequest, Completion, Token
from cluster.client.transcript import PartialAnswer
from cluster.core.cluster_state import ClusterState
from cluster.core.plan import LoadProgress
from cluster.v1 import cluster_pb2

LoadCall = StreamCall[cluster_pb2.LoadModelResponse] | FoundCall[cluster_pb2.LoadModelResponse]


class Stream(PartialAnswer):
    """An answer in progress: iterate over it to get its tokens.

    Leaving the loop or the ``with`` block early cancels the call, down to the workers. Iterating raises the
    MacpipeError that ended the answer early. An answer that ends without an error is complete.
    """

    def __init__(self, call: FollowedAnswer, offset: int | Sequence[int] = 0) -> None:
        super().__init__(offset)
        self._call = call

    def wait_accepted(self) -> AcceptedRequest:
        """Wait until the coordinator accepts the request. Raise its MacpipeError if it refuses."""
        while self._transcript.accepted is None:
            self._advance()
        return self._transcript.accepted

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens as they arrive. The last text may be in ``finish.text`` only; ``texts`` yields all of it."""
        try:
            while (tokens := self._advance()) is not None:
                yield from tokens
        finally:
            self.cancel()

    def texts(self) -> Iterator[str]:
        """Yield the answer's text as it becomes printable. The pieces add up to ``completion().text``."""
        try:
            for token in self:
                if token.text and token.sample == 0:
                    yield token.text
        finally:
            self.cancel()
        if self.finish and self.finish.text:
            yield self.finish.text

    def completion(self) -> Completion:
        """Wait for the end. Return the whole answer, including tokens that were already iterated over."""
        for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """Cancel the call; a reader waiting for a token gets Aborted. Do nothing once the answer is complete."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()

    def _advance(self) -> tuple[Token, ...] | None:
        """Return the tokens of the next event, or None after a complete answer."""
        reply = self._call.read()
        if reply is not None:
            return self._transcript.add_event(reply)
        self._transcript.close()
        return None


class Loading:
    """A load in progress: iterate for the LoadProgress of each stage and a final ClusterState, or call ``wait``.

    Leaving the loop early cancels the load. Raises DeadlineExceeded after ``stall_s`` seconds without an event.
    """

    def __init__(self, call: LoadCall, stall_s: float = STALL_TIMEOUT_S) -> None:
        self._call = call
        self._stall_s = stall_s

    def __iter__(self) -> Iterator[LoadProgress | ClusterState]:
        event = None
        try:
            while (following := self._next_event()) is not None:
                event = following
                yield event
        finally:
            self.cancel()
        require_serving(event)

    def wait(self) -> ClusterState:
        """Wait for the end. Return the cluster's state once it serves."""
        last = None
        for event in self:
            last = event
        return require_serving(last)

    def cancel(self) -> None:
        """Cancel the load. Do nothing once it is done."""
        self._call.cancel()

    def _next_event(self) -> LoadProgress | ClusterState | None:
        try:
            reply = self._call.read(self._stall_s)
        except TimeoutError:
            raise stall_error(self._stall_s) from None
        return None if reply is None else decode_load_event(reply)
