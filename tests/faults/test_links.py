"""Data streams over bad links: a silent cut is detected in seconds, and a slow link is never taken for dead."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.core.errors import Unreachable
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import liveness_channel
from cluster.transport.grpc_streams import DataServer, GrpcDialer
from cluster.transport.liveness_stream import beat
from cluster.transport.streams import Line, Outbox
from faults.proxy import Proxy

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs loopback addresses beside 127.0.0.1"),
    pytest.mark.xdist_group("faults"),
]
HOST = "127.9.8.7"
MIB = 2**20


class Stage:
    """One stage's ports."""

    def __init__(self) -> None:
        self.boxes = {line: Outbox(1) for line in Line}
        self.fed: list[int] = []

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        return self.boxes[line]

    def received(self, message: bytes) -> None:
        self.fed.append(len(message))


@pytest.fixture
def linked() -> Iterator[tuple[Proxy, Stage, str]]:
    stage = Stage()
    server = DataServer(LocalTrust(), "127.0.0.1", 0, stage)
    proxy = Proxy(lambda port, there: "caller", random.Random(1))
    proxy.listen(HOST, server.port, "stage", data=True)
    yield proxy, stage, f"{HOST}:{server.port}"
    for box in stage.boxes.values():
        box.close()
    server.stop()
    proxy.close()


@pytest.mark.parametrize("blocked", [{"stage"}, {"caller"}, {"stage", "caller"}])
def test_a_cut_is_seen_though_nothing_is_sent(
    linked: tuple[Proxy, Stage, str], blocked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _, address = linked
    lost, beats = threading.Event(), threading.Event()

    def beat_and_tell(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        beats.set()
        return beat(request, context)

    monkeypatch.setattr("cluster.transport.grpc_streams.beat", beat_and_tell)
    stream = GrpcDialer(LocalTrust()).pull(address, 1, lambda message: None, lambda why: lost.set())
    assert beats.wait(15)
    proxy.link("caller", "stage").blocked |= blocked
    assert lost.wait(15)
    stream.close()


def test_a_cut_before_the_liveness_stream_is_connected_is_seen(
    linked: tuple[Proxy, Stage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _, address = linked
    link, lost = proxy.link("caller", "stage"), threading.Event()

    def open_pulse(*given: Any) -> grpc.Channel:
        link.blocked |= {"stage", "caller"}
        return liveness_channel(*given)

    monkeypatch.setattr("cluster.transport.liveness_stream.CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr("cluster.transport.liveness_stream.liveness_channel", open_pulse)
    stream = GrpcDialer(LocalTrust()).pull(address, 1, lambda message: None, lambda why: lost.set())
    assert lost.wait(15)
    stream.close()


def test_an_overloaded_machine_asks_again_before_it_takes_silence_for_a_cut(
    linked: tuple[Proxy, Stage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, stage, address = linked
    link, lag, lost, heard = proxy.link("caller", "stage"), [0.0], list[str](), threading.Event()
    beats = threading.Semaphore(0)

    def open_pulse(*given: Any) -> grpc.Channel:
        link.blocked.clear()
        return liveness_channel(*given)

    def beat_and_tell(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        beats.release()
        return beat(request, context)

    monkeypatch.setattr("cluster.transport.liveness_stream.liveness_channel", open_pulse)
    monkeypatch.setattr("cluster.transport.grpc_streams.beat", beat_and_tell)
    stream = GrpcDialer(LocalTrust(), lambda: lag[0]).pull(address, 1, lambda message: heard.set(), lost.append)
    assert beats.acquire(timeout=15)
    lag[0] = 1.0
    link.blocked |= {"stage", "caller"}
    assert beats.acquire(timeout=15)
    stage.boxes[Line.URGENT].send(b"a frame")
    assert heard.wait(15)
    assert not lost
    stream.close()


def test_where_a_link_fell_silent_the_next_stream_is_given_less_time(linked: tuple[Proxy, Stage, str]) -> None:
    """So that a hop is relayed sooner; once a stream was accepted again, so is the next one given all its time."""
    proxy, _, address = linked
    dialer, link, lost = GrpcDialer(LocalTrust()), proxy.link("caller", "stage"), threading.Event()

    def no_answer(within: str) -> None:
        link.blocked |= {"stage"}
        with pytest.raises(Unreachable, match=f"no answer within {within}"):
            dialer.feed(address, 1, lambda why: None)
        link.blocked.clear()

    no_answer("5 s")
    stream = dialer.feed(address, 1, lambda why: lost.set())
    link.blocked |= {"stage"}
    assert lost.wait(15)
    stream.close()
    no_answer("2 s")
    dialer.feed(address, 1, lambda why: None).close()
    no_answer("5 s")


def test_megabytes_over_a_slow_link_are_no_cut(linked: tuple[Proxy, Stage, str]) -> None:
    """4 MiB at 10 Mbit/s and 100 ms delay every ping of their own connection by more than three seconds."""
    proxy, stage, address = linked
    link = proxy.link("caller", "stage")
    link.rate, link.delay_s = 10e6 / 8, 0.1
    lost: list[str] = []
    pulled = threading.Event()
    stream = GrpcDialer(LocalTrust()).pull(address, 1, lambda message: pulled.set(), lost.append, Line.BULK)
    feed = GrpcDialer(LocalTrust()).feed(address, 1, lost.append)
    stage.boxes[Line.BULK].send(bytes(4 * MIB))
    feed.send(bytes(4 * MIB))
    assert pulled.wait(30)
    while not stage.fed:
        assert not lost
        time.sleep(0.05)
    assert not lost
    stream.close()
    feed.close()
