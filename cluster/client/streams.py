"""What a blocking client hands out while the coordinator is still talking: an answer, or a load.

Each owns one call. Whoever stops listening cancels it, so that no Mac computes for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cluster.client.cluster_state import ClusterState
from cluster.client.deadlines import STALL_TIMEOUT_S, failures_told, require_serving, stall_error
from cluster.client.proto_decoding import load_event
from cluster.client.results import Completion, Prompt, Token
from cluster.client.transcript import Transcribed
from cluster.core.errors import MacpipeError
from cluster.core.plan import LoadProgress
from cluster.v1 import cluster_pb2, inference_pb2

if TYPE_CHECKING:  # grpc's classes are generic for type checkers alone
    import grpc

    AnswerCall = grpc.CallIterator[inference_pb2.GenerateResponse] | grpc.CallIterator[inference_pb2.ChatResponse]


class Stream(Transcribed):
    """An answer on its way: iterate over it for its tokens.

    Leaving the loop or the ``with`` block before the end cancels the call, all the way down to the workers. Iterating
    raises the MacpipeError that ended the answer early; an answer that ends without one is whole.
    """

    def __init__(self, call: AnswerCall, address: str, offset: int | Sequence[int] = 0) -> None:
        super().__init__(offset)
        self._call = call
        self._address = address

    def wait_accepted(self) -> Prompt:
        """Wait for the coordinator to accept the request; raises the MacpipeError with which it refused."""
        while self._transcript.prompt is None:
            self._advance()
        return self._transcript.prompt

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come. The last words may be in ``finish.text``: ``texts`` has them all."""
        try:
            while (tokens := self._advance()) is not None:
                yield from tokens
        finally:
            self.cancel()

    def texts(self) -> Iterator[str]:
        """The answer's text, piece by piece as it becomes printable; together they are ``completion().text``."""
        yield from (token.text for token in self if token.text and token.sample == 0)
        if self.finish and self.finish.text:
            yield self.finish.text

    def completion(self) -> Completion:
        """Wait for the end; returns the whole answer, with the tokens that were already taken from here."""
        for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """End the call now; who waits for a token gets Aborted. Does nothing once the answer is complete."""
        self._call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()

    def _advance(self) -> tuple[Token, ...] | None:
        """The tokens of the next event; None once the stream has ended as it should."""
        with failures_told(self._address):
            for reply in self._call:
                return self._transcript.accept(reply)
        self._transcript.close()
        return None


class Loading:
    """A load on its way: iterate for LoadProgress of each stage and, last, the ClusterState; or ``wait``.

    Leaving the loop early cancels the load. Raises DeadlineExceeded when nothing is heard for ``stall_s`` seconds.
    """

    def __init__(
        self, call: grpc.CallIterator[cluster_pb2.LoadModelResponse], address: str, stall_s: float = STALL_TIMEOUT_S
    ) -> None:
        self._call = call
        self._address = address
        self._stall_s = stall_s
        self._stalled = False

    def __iter__(self) -> Iterator[LoadProgress | ClusterState]:
        event = None
        try:
            while (coming := self._next_event()) is not None:
                event = coming
                yield event
        finally:
            self.cancel()
        require_serving(event)

    def wait(self) -> ClusterState:
        """Wait for the end; returns the cluster's state once it serves."""
        last = None
        for event in self:
            last = event
        return require_serving(last)

    def cancel(self) -> None:
        """Give the load up. Does nothing once it is done."""
        self._call.cancel()  # type: ignore[no-untyped-call]

    def _next_event(self) -> LoadProgress | ClusterState | None:
        watchdog = threading.Timer(self._stall_s, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            with failures_told(self._address):
                return next((load_event(reply) for reply in self._call), None)
        except MacpipeError:
            if self._stalled:
                raise stall_error(self._stall_s) from None
            raise
        finally:
            watchdog.cancel()

    def _give_up(self) -> None:
        self._stalled = True
        self._call.cancel()  # type: ignore[no-untyped-call]
