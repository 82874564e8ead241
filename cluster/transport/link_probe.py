"""Measures the round-trip time and the bandwidth of the link from a data port to this process.

The probe uses a stream like those that carry frames: the client sends a size, the data port answers with as many bytes.
Client and server both bound the number and size of messages. This module knows nothing of workers.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from queue import SimpleQueue
from statistics import median
from typing import Any

import grpc

from cluster.core.errors import Unreachable
from cluster.core.link_limits import PROBE_BYTES, PROBE_MESSAGES, PROBE_TIMEOUT_S, PROBES, REACH_TIMEOUT_S
from cluster.core.plan import Link
from cluster.core.text import parse_address
from cluster.security.trust import WORKER, Trust
from cluster.transport.grpc_setup import data_channel

__all__ = ["ProbeHandlers", "find_own_address", "measure_link"]

PROBE = "/cluster.v1.StageService/Probe"
_SIZE_BYTES = 4


class ProbeHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its typing stub alone
    """The server's end of a probe."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return grpc.stream_stream_rpc_method_handler(_answer_probe) if handler_call_details.method == PROBE else None


def _answer_probe(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for request in islice(requests, PROBES + PROBE_MESSAGES + 1):
        yield bytes(min(int.from_bytes(request[:_SIZE_BYTES], "little"), PROBE_BYTES))


def measure_link(trust: Trust, address: str, peer: str = WORKER) -> Link:
    """Measure the link from the data port of ``peer`` at ``address`` to this process.

    Block for at most ``PROBE_TIMEOUT_S``. Transfer about ``PROBE_MESSAGES`` x ``PROBE_BYTES`` bytes. Raise
    ``Unreachable``.
    """
    channel = data_channel(trust, address, peer, 2 * PROBE_BYTES)
    sizes: SimpleQueue[int | None] = SimpleQueue()
    asked = (n.to_bytes(_SIZE_BYTES, "little") for n in iter(sizes.get, None))
    try:
        answers: Any = channel.stream_stream(PROBE, None, None)(asked, timeout=PROBE_TIMEOUT_S)

        def seconds(size: int) -> float:
            began = time.perf_counter()
            sizes.put(size)
            next(answers)
            return time.perf_counter() - began

        return _compute_link(seconds)
    except grpc.RpcError as e:
        raise Unreachable(f"cannot measure the link from {address}: {e.details()}") from e
    finally:
        sizes.put(None)
        channel.close()


def find_own_address(address: str) -> str:
    """Return this machine's IP address on a connection to ``address``; empty if it cannot be reached.

    Block for at most ``REACH_TIMEOUT_S``.
    """
    try:
        with socket.create_connection(parse_address(address), timeout=REACH_TIMEOUT_S) as connection:
            return str(connection.getsockname()[0])
    except OSError:
        return ""


def _compute_link(seconds: Callable[[int], float]) -> Link:
    """Return the link from median times. The first message is not counted, because it opens the connection."""
    seconds(0)
    round_trip = median(seconds(0) for _ in range(PROBES))
    bulk = median(seconds(PROBE_BYTES) for _ in range(PROBE_MESSAGES))
    return Link(round_trip, PROBE_BYTES / max(bulk - round_trip, 1e-6))
