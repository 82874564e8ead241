"""The contract of data streams, kept by gRPC on real sockets and by the in-memory network alike."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from cluster.core.errors import StaleEpoch, Unreachable
from cluster.core.limits import MAX_FRAME_BYTES, MAX_FRAMES_WAITING, MIB
from cluster.security.credentials import LocalTrust
from cluster.transport import streams
from cluster.transport.grpc_streams import PULL, DataServer, GrpcDialer
from cluster.transport.in_memory import MemoryNetwork
from cluster.transport.streams import Dialer, Line, Outbox

EPOCH = 7
WAIT_S = 10


class Echo:
    """A stage that sends on what it is fed, with a mark."""

    def __init__(self) -> None:
        self.box, self.bulk = Outbox(EPOCH), Outbox(EPOCH)

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        if epoch != EPOCH:
            return None
        return self.bulk if line is Line.BULK else self.box

    def received(self, message: bytes) -> None:
        self.box.send(b"<" + message)


@dataclass
class Port:
    """A data port with an echo behind it, and the way to reach it."""

    dialer: Dialer
    address: str
    stage: Echo
    cut: Callable[[], None]


@dataclass
class Ear:
    """Remembers what a stream delivered and how it was lost."""

    heard: queue.Queue[bytes] = field(default_factory=queue.Queue)
    lost: queue.Queue[str] = field(default_factory=queue.Queue)

    def next(self) -> bytes:
        return self.heard.get(timeout=WAIT_S)


@pytest.fixture(params=["grpc", "memory"])
def port(request: pytest.FixtureRequest) -> Iterator[Port]:
    stage = Echo()
    if request.param == "memory":
        network = MemoryNetwork({"a:1": stage})
        yield Port(network, "a:1", stage, lambda: network.cut("a:1"))
        stage.box.close()
        return
    server = DataServer(LocalTrust(), "127.0.0.1", 0, stage)
    yield Port(GrpcDialer(LocalTrust()), f"127.0.0.1:{server.port}", stage, server.stop)
    stage.box.close()
    server.stop()


def test_messages_arrive_in_order_and_whole(port: Port) -> None:
    ear = Ear()
    pull = port.dialer.pull(port.address, EPOCH, ear.heard.put, ear.lost.put)
    feed = port.dialer.feed(port.address, EPOCH, ear.lost.put)
    sent = [bytes([i % 251]) * (1 + 977 * i % 40_000) for i in range(300)]
    for message in sent:
        feed.send(message)
    assert [ear.next() for _ in sent] == [b"<" + m for m in sent]
    big = bytes(20 * MIB)
    feed.send(big)
    assert ear.next() == b"<" + big
    feed.close()
    pull.close()
    time.sleep(0.1)
    assert ear.lost.empty()


def test_another_epoch_is_refused(port: Port) -> None:
    ear = Ear()
    with pytest.raises(StaleEpoch, match="no stage of epoch 8 is loaded"):
        port.dialer.pull(port.address, EPOCH + 1, ear.heard.put, ear.lost.put)
    with pytest.raises(StaleEpoch, match="no stage of epoch 8 is loaded"):
        port.dialer.feed(port.address, EPOCH + 1, ear.lost.put)


def test_a_stages_frames_have_one_reader(port: Port) -> None:
    ear = Ear()
    first = port.dialer.pull(port.address, EPOCH, ear.heard.put, ear.lost.put)
    with pytest.raises(Unreachable, match="another reader already pulls"):
        port.dialer.pull(port.address, EPOCH, ear.heard.put, ear.lost.put)
    port.stage.received(b"x")
    assert ear.next() == b"<x"
    first.close()


def test_what_is_urgent_does_not_wait_behind_bulk(port: Port) -> None:
    """The reader of the bulk line is stuck; the urgent line goes on."""
    urgent, stuck, seen = Ear(), threading.Event(), Ear()

    def slow(message: bytes) -> None:
        stuck.wait(WAIT_S)
        seen.heard.put(message)

    pulls = [
        port.dialer.pull(port.address, EPOCH, urgent.heard.put, urgent.lost.put, Line.URGENT),
        port.dialer.pull(port.address, EPOCH, slow, seen.lost.put, Line.BULK),
    ]
    for i in range(20):
        port.stage.bulk.send(bytes([i]) * MIB)
    port.stage.box.send(b"token")
    assert urgent.next() == b"token"
    assert seen.heard.empty()
    stuck.set()
    assert [seen.next()[0] for _ in range(20)] == list(range(20))
    for pull in pulls:
        pull.close()


def test_a_cut_is_told_once_to_each_end(port: Port) -> None:
    pulling, feeding = Ear(), Ear()
    port.dialer.pull(port.address, EPOCH, pulling.heard.put, pulling.lost.put)
    port.dialer.feed(port.address, EPOCH, feeding.lost.put)
    port.cut()
    assert "broke" in pulling.lost.get(timeout=WAIT_S)
    assert "broke" in feeding.lost.get(timeout=WAIT_S)
    time.sleep(0.2)
    assert pulling.lost.empty()
    assert feeding.lost.empty()


def test_nobody_there_is_unreachable_in_time() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(Unreachable, match=address):
        GrpcDialer(LocalTrust()).feed(address, EPOCH, lambda why: None)
    with pytest.raises(Unreachable, match="nothing listens there"):
        MemoryNetwork().feed("a:1", EPOCH, lambda why: None)


def test_a_message_above_the_bound_ends_the_stream() -> None:
    stage, ear = Echo(), Ear()
    server = DataServer(LocalTrust(), "127.0.0.1", 0, stage)
    feed = GrpcDialer(LocalTrust()).feed(f"127.0.0.1:{server.port}", EPOCH, ear.lost.put)
    feed.send(bytes(MAX_FRAME_BYTES + 1))
    assert "broke" in ear.lost.get(timeout=WAIT_S)
    feed.close()
    server.stop()


def test_an_outbox_that_nobody_reads_is_bounded_and_says_so() -> None:
    box = Outbox(EPOCH)
    for _ in range(MAX_FRAMES_WAITING + 5):
        box.send(b"x")
    assert box.overflowed
    assert sum(1 for _ in box) < MAX_FRAMES_WAITING


def test_an_outbox_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_WAITING_BYTES", 100)
    box = Outbox(EPOCH)
    box.send(bytes(150))  # one may always wait, or a frame that is allowed could not travel
    assert not box.overflowed
    box.send(b"x")
    assert box.overflowed
    assert list(box) == []  # what waited is let go at once
    box.send(b"x")
    assert box.waiting_bytes <= 151


def test_what_is_read_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_WAITING_BYTES", 100)
    box, got = Outbox(EPOCH), []
    reader = threading.Thread(target=lambda: got.extend(box))
    reader.start()
    for number in range(30):
        box.send(bytes(60))
        deadline = time.monotonic() + WAIT_S
        while len(got) <= number and not box.overflowed:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    box.close()
    reader.join(WAIT_S)
    assert not box.overflowed
    assert len(got) == 30


def test_a_reader_that_takes_nothing_loses_its_stream_before_memory_goes(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_WAITING_BYTES", 64 * MIB)
    ear, hold = Ear(), threading.Event()

    def slow(message: bytes) -> None:
        hold.wait(WAIT_S)

    pull = port.dialer.pull(port.address, EPOCH, slow, ear.lost.put)
    box, piece, sent = port.stage.box, bytes(8 * MIB), 0
    while not box.overflowed and sent < 100:
        box.send(piece)
        sent += 1
    assert box.overflowed
    assert box.waiting_bytes <= 80 * MIB
    hold.set()
    assert "broke" in ear.lost.get(timeout=WAIT_S)
    pull.close()


def test_a_stream_of_another_term_is_refused() -> None:
    stage, term = Echo(), [4]
    server = DataServer(LocalTrust(), "127.0.0.1", 0, stage, lambda: term[0])
    for mine in (3, 0):
        with pytest.raises(StaleEpoch, match="no stage of epoch 7 is loaded"):
            GrpcDialer(LocalTrust(), term=lambda mine=mine: mine).feed(
                f"127.0.0.1:{server.port}", EPOCH, Ear().lost.put
            )
    GrpcDialer(LocalTrust(), term=lambda: 4).feed(f"127.0.0.1:{server.port}", EPOCH, Ear().lost.put).close()
    stage.box.close()
    server.stop()


@pytest.mark.parametrize("epoch", ["9" * 5000, "-1", "", "x", "1e3"])
def test_an_epoch_that_is_no_number_is_refused(epoch: str) -> None:
    server = DataServer(LocalTrust(), "127.0.0.1", 0, Echo())
    with grpc.secure_channel(f"127.0.0.1:{server.port}", grpc.local_channel_credentials()) as channel:
        call = channel.unary_stream(PULL, None, None)(b"", metadata=(("macpipe-epoch", epoch),))
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    server.stop()


def test_streams_leave_no_thread_and_no_connection_behind(port: Port) -> None:
    def count_files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    ear = Ear()
    threads, files = threading.active_count(), count_files()
    for _ in range(3):
        port.stage.box = Outbox(EPOCH)  # an outbox has one reader
        pull = port.dialer.pull(port.address, EPOCH, ear.heard.put, ear.lost.put)
        feed = port.dialer.feed(port.address, EPOCH, ear.lost.put)
        feed.close()
        pull.close()
    deadline = time.monotonic() + WAIT_S
    while threading.active_count() > threads + 4 or count_files() > files + 4:
        # the data port keeps its own pool of threads, and gRPC the files of its pollers
        assert time.monotonic() < deadline, (count_files() - files, [t.name for t in threading.enumerate()])
        time.sleep(0.05)
    assert ear.lost.empty()
