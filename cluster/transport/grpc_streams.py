"""The data plane over gRPC: raw bytes on two streaming methods of a stage's data port, with one thread per stream.

``Feed`` carries frames from the coordinator into a stage. ``Pull`` carries a stage's frames to the next stage or the
coordinator. A pull (one thread reads, one yields) was the fastest path in gRPC's public API: 237 us per hop of 16 KiB,
against 274 us on an asyncio stream and 1,000 us for a unary call. Metadata carries the term, the epoch and the line, so
that the server refuses a stream of another term or epoch before it reads a byte.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc

from cluster.core.errors import StaleEpoch, Unreachable
from cluster.core.group_limits import MAX_RANKS
from cluster.core.limits import CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S
from cluster.membership.slowness import Alarms, extra_s
from cluster.platform.overload import Lag, no_lag
from cluster.security.trust import WORKER, Trust
from cluster.transport.grpc_setup import PING_S, bind, data_channel, data_server
from cluster.transport.link_probe import ProbeHandlers
from cluster.transport.liveness_stream import PULSE, LivenessStream, beat
from cluster.transport.streams import Line, Lost, Outbox, Received, Sender, Subscription

FEED = "/cluster.v1.StageService/Feed"
PULL = "/cluster.v1.StageService/Pull"
_EPOCH = "macpipe-epoch"
_EPOCH_DIGITS = 19
"""Maximum decimal digits of an epoch, which is a 63-bit number."""
_TERM = "macpipe-term"
_LINE = "macpipe-line"
_READER = "macpipe-reader"
_READERS = tuple(map(str, range(MAX_RANKS)))
_ACCEPTED = b""
"""The first message of every stream: the server has accepted it."""

TermOf = Callable[[], int]
"""Returns the number of the term that a process leads or serves now."""


def no_term() -> int:
    """Return the number of a process that leads and serves nobody."""
    return 0


class Stages(Protocol):
    """The interface to what a data port serves: at most one loaded stage."""

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        """Return a reader's outbox of that epoch's stage on a line.

        None if no stage of that epoch is loaded, or if it has no such reader.
        """

    def received(self, message: bytes) -> None:
        """Take a message from a feed, on either line."""


class DataServer:
    """A listening data port. ``port`` is the actual port number. It serves streams of ``term`` alone."""

    def __init__(self, trust: Trust, host: str, port: int, stages: Stages, term: TermOf = no_term) -> None:
        self._server, self._close_authorization = data_server(trust)
        self._server.add_generic_rpc_handlers((_Handlers(stages, term), ProbeHandlers()))
        self.port = bind(self._server, trust, host, port)
        self._server.start()

    def stop(self) -> None:
        self._close_authorization()
        self._server.stop(grace=None)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its typing stub alone
    def __init__(self, stages: Stages, term: TermOf) -> None:
        self._stages, self._term = stages, term

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method == FEED:
            return grpc.stream_stream_rpc_method_handler(self._feed)
        if handler_call_details.method == PULL:
            return grpc.unary_stream_rpc_method_handler(self._pull)
        if handler_call_details.method == PULSE:
            return grpc.unary_stream_rpc_method_handler(beat)
        return None

    def _outbox(self, context: grpc.ServicerContext) -> Outbox:
        metadata = dict(context.invocation_metadata())
        epoch = str(metadata.get(_EPOCH, ""))
        line = Line.BULK if metadata.get(_LINE) == Line.BULK else Line.URGENT
        valid = epoch.isascii() and epoch.isdigit() and len(epoch) <= _EPOCH_DIGITS
        of_term = metadata.get(_TERM, "0") == str(self._term())
        reader = str(metadata.get(_READER, "0"))
        valid = valid and reader in _READERS
        outbox = self._stages.outbox(int(epoch), line, int(reader)) if valid and of_term else None
        if outbox is None:
            shown = epoch if valid else "(invalid)"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"no stage of epoch {shown} is loaded here")
        return outbox

    def _feed(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._outbox(context)
        yield _ACCEPTED
        for message in messages:
            self._stages.received(message)

    def _pull(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        outbox = self._outbox(context)
        if not outbox.take():
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "another reader already pulls this stage's frames")
        if not context.add_callback(outbox.close):
            return
        yield _ACCEPTED
        yield from outbox
        if outbox.overflowed:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the reader did not keep up")


class GrpcDialer:
    """Opens streams to data ports over gRPC, each on a connection of its own.

    After an address fell silent, the next attempt to connect gets less time: the link is most likely still cut, and
    requests wait. Connecting and pings get more time for an address that fell silent repeatedly, and for all addresses
    while this machine is overloaded (``lag``): the cause is then a slow machine rather than a cut link. Streams are of
    the term that ``term`` returns.
    """

    def __init__(self, trust: Trust, lag: Lag = no_lag, term: TermOf = no_term) -> None:
        self._trust, self._lag, self._term = trust, lag, term
        self._silent: set[str] = set()
        self._alarms = Alarms()

    def feed(self, address: str, epoch: int, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER) -> Sender:
        return self._open(address, peer, _Call(FEED, self._term(), epoch, line, _ignore, lost))

    def pull(
        self,
        address: str,
        epoch: int,
        received: Received,
        lost: Lost,
        line: Line = Line.URGENT,
        peer: str = WORKER,
        reader: int = 0,
    ) -> Subscription:
        return self._open(address, peer, _Call(PULL, self._term(), epoch, line, received, lost, reader))

    def _open(self, address: str, peer: str, call: _Call) -> _Stream:
        base_s = RECONNECT_TIMEOUT_S if address in self._silent else CONNECT_TIMEOUT_S
        stream = _Stream(self._trust, address, peer, call, base_s + self._ping_s(address) - PING_S)
        self._silent.discard(address)
        if call.line is Line.URGENT:  # one liveness stream detects a cut link for both lines
            ping_s = partial(self._ping_s, address)
            stream.watch(
                LivenessStream(self._trust, address, peer, stream.end, partial(self._fell_silent, address), ping_s)
            )
        return stream

    def _ping_s(self, address: str) -> float:
        """Return how long the answer to a ping may take, in seconds."""
        return PING_S * self._alarms.growth(address, time.monotonic()) + extra_s(self._lag())

    def _fell_silent(self, address: str) -> None:
        self._silent.add(address)
        self._alarms.add(address, time.monotonic())


def _ignore(message: bytes) -> None:
    """Ignore a message: the server of a feed sends nothing after the acceptance."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A stream's method, term, epoch and line, its callbacks, and which of the stage's readers it is."""

    method: str
    term: int
    epoch: int
    line: Line
    received: Received
    lost: Lost
    reader: int = 0


class _Stream:
    """One stream and the thread that reads it.

    The constructor returns once the server has accepted the stream. It raises ``StaleEpoch`` if the server refuses the
    epoch, and ``Unreachable`` for any other failure, or if there is no answer within ``timeout_s``.
    """

    def __init__(self, trust: Trust, address: str, peer: str, call: _Call, timeout_s: float) -> None:
        self._channel = data_channel(trust, address, peer)
        self._address = address
        self._received = call.received
        self._lost = call.lost
        self._outbox = Outbox(call.epoch)
        self._closed = self._ended = False
        self._ending = threading.Lock()
        self._accepted = threading.Event()
        self._refusal: grpc.RpcError | None = None
        self._ended_early = False
        metadata = (
            (_TERM, str(call.term)),
            (_EPOCH, str(call.epoch)),
            (_LINE, call.line.value),
            (_READER, str(call.reader)),
        )
        self._call = self._open(call.method, metadata)
        threading.Thread(target=self._read, name=f"{call.method} {address}", daemon=True).start()
        self._liveness: LivenessStream | None = None
        self._await_acceptance(timeout_s)

    def _open(self, method: str, metadata: tuple[tuple[str, str], ...]) -> Any:
        if method == FEED:
            return self._channel.stream_stream(method, None, None)(
                iter(self._outbox), metadata=metadata, wait_for_ready=True
            )
        return self._channel.unary_stream(method, None, None)(b"", metadata=metadata, wait_for_ready=True)

    def _await_acceptance(self, timeout_s: float) -> None:
        answered = self._accepted.wait(timeout_s)
        refusal = self._refusal  # read it before ``close``, which sets one of its own
        if answered and refusal is None and not self._ended_early:
            return
        self.close()
        if refusal is not None and refusal.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise StaleEpoch(f"{self._address} refused a stream: {refusal.details()}")
        failure = "it ended at once" if answered else f"no answer within {timeout_s:.0f} s"
        raise Unreachable(f"cannot open a data stream to {self._address}: {refusal.details() if refusal else failure}")

    def _read(self) -> None:
        try:
            next(self._call)
            self._accepted.set()
            for message in self._call:
                self._received(message)
            self.end("the stream ended")
        except StopIteration:
            self._ended_early = True
            self._accepted.set()
        except grpc.RpcError as e:
            self._refusal = e
            self.end(f"{e.code().name}: {e.details()}")

    def watch(self, liveness: LivenessStream) -> None:
        """Attach a liveness stream, which ``close`` closes too."""
        self._liveness = liveness

    def end(self, why: str) -> None:
        """Report the end of the stream or of its liveness stream. Only the first end is passed to ``lost``."""
        with self._ending:
            opened = self._accepted.is_set()
            reported = self._closed or self._ended
            self._accepted.set()
            self._ended = opened
        if opened and not reported:
            self._lost(f"the data stream with {self._address} broke ({why})")

    def send(self, message: bytes) -> None:
        self._outbox.send(message)

    def close(self) -> None:
        self._closed = True
        if self._liveness:
            self._liveness.close()
        self._outbox.close()
        self._channel.close()  # ends the call too; a cancelled one would leak (see ``grpc_setup.ONE_THREAD``)
