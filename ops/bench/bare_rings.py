"""Rings that only forward bytes: the least that a hop costs, over gRPC and over raw sockets.

Each ring has two stages in separate processes, and a driver in this one. A round trip sends the three messages of a
decode step: ids to stage 0, an activation to stage 1, a token back.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc

from cluster.core.frames import Compute, Frame, Sample, StageTiming, Step, Tensor
from cluster.wire.frame_codec import encode

WIDTH = 64
METHOD = "/bench.Ring/Pull"
_LENGTH = struct.Struct("<I")


def messages() -> tuple[bytes, bytes, bytes]:
    """Return the frames of one decode step, in the order of the hops."""
    timing = StageTiming(0, 10, 100, 10)
    step = Step(Compute.DECODE, (1,), ((7,),))
    activation = Tensor("float32", (1, 1, WIDTH), bytes(4 * WIDTH))
    epoch = 1_700_000_000_000
    return (
        encode(Frame(epoch, 0, 1, step=step)),
        encode(Frame(epoch, 0, 1, step=step, tensors=(activation,), timings=(timing,))),
        encode(Frame(epoch, 0, 1, samples=(Sample(1, 9, 7),), timings=(timing, timing))),
    )


# gRPC: each party pulls from the one before it; one thread reads, answers and yields.


class _Pulled(grpc.GenericRpcHandler):
    def __init__(self, outgoing: Callable[[], Iterator[bytes]]) -> None:
        self._outgoing = outgoing

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(lambda request, context: self._outgoing())


def _serve(outgoing: Callable[[], Iterator[bytes]]) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(2), handlers=(_Pulled(outgoing),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, int(port)


def _pull(port: int) -> Iterator[bytes]:
    return iter(grpc.insecure_channel(f"127.0.0.1:{port}").unary_stream(METHOD)(b"", wait_for_ready=True))


def grpc_stage(before: int, answer: bytes) -> None:
    def outgoing() -> Iterator[bytes]:
        for _ in _pull(before):
            yield answer

    _server, port = _serve(outgoing)
    print(port, flush=True)
    sys.stdin.read()
    os._exit(0)  # the thread that waits for the stage before would hold the process


class GrpcRing:
    """Drive the ring with ``step``; close it with ``close``."""

    def __init__(self) -> None:
        self._first, *answers = messages()
        self._frames: SimpleQueue[bytes] = SimpleQueue()
        self._server, port = _serve(lambda: iter(self._frames.get, b""))
        self._stages = []
        for answer in answers:
            process, port = _start("grpc", port, answer)
            self._stages.append(process)
        self._replies = _pull(port)

    def step(self) -> None:
        self._frames.put(self._first)
        next(self._replies)

    def close(self) -> None:
        _end(self._stages)
        self._frames.put(b"")
        self._server.stop(None)


# Raw sockets: blocking, one connection a hop.


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    return _exactly(connection, _LENGTH.unpack(_exactly(connection, _LENGTH.size))[0])


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def _quick(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def socket_stage(before: int, answer: bytes) -> None:
    incoming = _quick(socket.create_connection(("127.0.0.1", before)))
    server = _listen()
    print(server.getsockname()[1], flush=True)
    outgoing = _quick(server.accept()[0])
    try:
        while True:
            _receive(incoming)
            _send(outgoing, answer)
    except (EOFError, ConnectionError):
        return


class SocketRing:
    """Drive the ring with ``step``; close it with ``close``."""

    def __init__(self) -> None:
        self._first, *answers = messages()
        server = _listen()
        port, self._stages = server.getsockname()[1], []
        for answer in answers:
            process, port = _start("socket", port, answer)
            self._stages.append(process)
        self._outgoing = _quick(server.accept()[0])
        self._incoming = _quick(socket.create_connection(("127.0.0.1", port)))

    def step(self) -> None:
        _send(self._outgoing, self._first)
        _receive(self._incoming)

    def close(self) -> None:
        self._outgoing.close()
        self._incoming.close()
        _end(self._stages)


def _start(kind: str, before: int, answer: bytes) -> tuple[subprocess.Popen[str], int]:
    arguments = [sys.executable, __file__, kind, str(before), answer.hex()]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate(timeout=10)


if __name__ == "__main__":
    kind, before, answer = sys.argv[1:]
    (grpc_stage if kind == "grpc" else socket_stage)(int(before), bytes.fromhex(answer))
