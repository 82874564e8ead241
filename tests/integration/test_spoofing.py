"""Ten thousand announcements of fake workers: the cluster continues, and none of them is contacted."""

from __future__ import annotations

import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from zeroconf import DNSAddress, DNSOutgoing, DNSPointer, DNSService, DNSText, const

from cluster import __version__
from cluster.client import Client
from cluster.core.limits import MAX_ROSTER, MIB
from cluster.discovery import txt_record as txt
from integration.daemons import Cluster, Footprint

pytestmark = [pytest.mark.timeout(240), pytest.mark.long]
FAKES = 10_000
A_PACKET = 20
GROUP = ("224.0.0.251", 5353)
GROWTH = 64 * MIB


class Sink:
    """A port on every address of loopback that takes what it is sent, answers nothing, and forgets nothing."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._listener = socket.create_server(("0.0.0.0", 0), backlog=512)  # noqa: S104  # all of 127.0.0.0/8
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(65_536):
                self.heard.append(data)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


def packets(cluster: str, port: int) -> Iterator[bytes]:
    """Return announcements of as many workers as there are fakes, all of this cluster, each at its own address."""
    for first in range(0, FAKES, A_PACKET):
        out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
        for number in range(first, first + A_PACKET):
            said = txt.Announcement(secrets.token_hex(8), f"fake-{number}", __version__, cluster)
            name, host = f"fake-{number}.{txt.SERVICE}", f"fake-{number}.local."
            record = b"".join(bytes((len(pair),)) + pair for pair in (k + b"=" + v for k, v in txt.write(said).items()))
            address = struct.pack(">I", (127 << 24) + 256 + number)
            unique = const._CLASS_IN | const._CLASS_UNIQUE
            out.add_answer_at_time(DNSPointer(txt.SERVICE, const._TYPE_PTR, const._CLASS_IN, 120, name), 0)
            out.add_answer_at_time(DNSService(name, const._TYPE_SRV, unique, 120, 0, 0, port, host), 0)
            out.add_answer_at_time(DNSText(name, const._TYPE_TXT, unique, 120, record), 0)
            out.add_answer_at_time(DNSAddress(host, const._TYPE_A, unique, 120, address), 0)
        yield from out.packets()


def flood(cluster: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talker:
        talker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for packet in packets(cluster, port):
            talker.sendto(packet, GROUP)
            time.sleep(0.005)  # a socket's buffer holds some dozens of them


def test_no_word_goes_to_workers_that_are_none(cluster: Cluster, llama, sink: Sink) -> None:  # type: ignore[no-untyped-def]
    word = f"xyzzy{secrets.token_hex(6)}"
    cluster.worker("ada")
    serve, address = cluster.serving(llama, 1)
    before = Footprint.of(serve.process.pid)
    with Client(address, timeout_s=60) as client:
        told = client.generate(f"{word} and", max_tokens=8, ignore_eos=True, temperature=0).tokens
        flood(cluster.name, sink.port)
        deadline = time.monotonic() + 30
        while len(client.cluster().workers) < 2 and not sink.heard:
            assert time.monotonic() < deadline, "none of the announcements was heard: the test shows nothing"
            time.sleep(0.2)
        for _ in range(5):
            assert client.generate(f"{word} and", max_tokens=8, ignore_eos=True, temperature=0).tokens == told
            client.chat([("user", word)], max_tokens=4)
        state = client.cluster()
    after = Footprint.of(serve.process.pid)
    assert state.state == "serving"
    assert len(state.workers) <= MAX_ROSTER
    assert [stage.worker for stage in state.stages] == ["ada"]
    assert sink.heard, "nobody called the fakes, so they could not have been told anything"
    assert not [data for data in sink.heard if word.encode() in data or re.search(rb"macpipe-epoch", data)]
    assert after.resident - before.resident < GROWTH
    print(f"{after.resident - before.resident >> 10} KiB more, {len(sink.heard)} messages to fakes")
