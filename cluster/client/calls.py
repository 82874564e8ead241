"""Blocking gRPC calls and background work in a thread. It has the same names as ``cluster.client.async_calls``.

Only these two modules are written twice: ``ops/clients`` generates the rest of the blocking client from the asyncio
one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

import grpc

from cluster.client.deadlines import translate_errors
from cluster.core.errors import Aborted, ConnectionLost, MacpipeError
from cluster.security.trust import ChannelOptions
from cluster.v1 import cluster_pb2_grpc, inference_pb2_grpc

if TYPE_CHECKING:  # grpc's classes are subscriptable only for type checkers
    UnaryMethod = grpc.UnaryUnaryMultiCallable
    StreamMethod = grpc.UnaryStreamMultiCallable

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")


class Stubs:
    """A channel and the stubs of the public services on it. Threads may share it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials, options: ChannelOptions) -> None:
        self.address = address
        self.closed = False
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel. Running calls end with Aborted."""
        self.closed = True
        self._channel.close()


class UnaryCall(Generic[R]):
    """A started call with one reply. It keeps its channel open."""

    def __init__(self, stubs: Stubs, method: UnaryMethod[Q, R], request: Q, timeout_s: float | None) -> None:
        self._stubs = stubs
        self.address = stubs.address
        self._call = method.future(request, timeout=timeout_s)

    def wait(self) -> R:
        """Return the reply. Raise the call's MacpipeError, and cancel the call if the wait is interrupted."""
        try:
            with _translate_errors(self._stubs):
                return self._call.result()
        finally:
            self._call.cancel()  # type: ignore[no-untyped-call]


class StreamCall(Generic[R]):
    """A started call with a stream of replies. It keeps its channel open."""

    def __init__(self, stubs: Stubs, method: StreamMethod[Q, R], request: Q, timeout_s: float | None) -> None:
        self._stubs = stubs
        self.address = stubs.address
        self._cancelled = threading.Event()
        self._call = method(request, timeout=timeout_s)

    def read(self, within_s: float | None = None) -> R | None:
        """Return the next reply, or None after the last. Raise the call's MacpipeError.

        Cancel the call and raise TimeoutError after ``within_s`` seconds without a reply.
        """
        if within_s is None:
            return self._read()
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            self.cancel()

        watchdog = threading.Timer(within_s, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self._read()
        except MacpipeError:
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            watchdog.cancel()

    def cancel(self) -> None:
        """Cancel the call. Do nothing once it has ended."""
        self._cancelled.set()
        self._call.cancel()  # type: ignore[no-untyped-call]

    def _read(self) -> R | None:
        with _translate_errors(self._stubs, self._cancelled.is_set):
            return next(iter(self._call), None)


@contextmanager
def _translate_errors(stubs: Stubs, is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Translate gRPC errors, those of a call that this side cancelled into Aborted.

    gRPC gives it the same status as one that a coordinator cancels which stops.
    """
    try:
        with translate_errors(stubs.address):
            yield
    except ConnectionLost as error:
        if is_cancelled() or stubs.closed:
            raise Aborted(f"the call to the coordinator at {stubs.address} was cancelled") from error
        raise


class Pause:
    """Waits that end early once ``end`` is called."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait. Return whether the pauses were ended."""
        return self._ended.wait(seconds)

    def end(self) -> None:
        """End this wait and all later ones."""
        self._ended.set()


class Repeater:
    """Runs the method ``work`` in the thread ``name`` until stopped. ``work`` returns the seconds until its next run.

    When the object of ``work`` is deleted, the thread ends within ``longest_s`` seconds.
    """

    def __init__(self, name: str, work: Callable[[], float], longest_s: float) -> None:
        self._name = name
        self._work = weakref.WeakMethod(work)
        self._longest_s = longest_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Do nothing if it was started before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self, within_s: float) -> None:
        """End after the current run, or after ``within_s`` seconds."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(within_s)

    def _run(self) -> None:
        while (work := self._work()) is not None:
            wait_s = work()
            del work  # or the wait would keep its object alive
            if self._stopping.wait(min(wait_s, self._longest_s)):
                return


def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that may block."""
    return function(*args, **kwargs)
