"""A data port on several addresses of this machine; 127.0.0.2 stands for a second cable."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.security.credentials import LocalTrust
from cluster.transport.link_probe import find_own_address
from cluster.transport.streams import Line
from cluster.worker import data_port
from cluster.worker.data_port import DataPort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has one loopback address")
CABLE = "127.0.0.2"


class Nothing:
    """A data port without a stage."""

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> None:
        return None

    def received(self, message: bytes) -> None:
        raise AssertionError(message)


@pytest.fixture
def port() -> Iterator[DataPort]:
    opened = DataPort(LocalTrust(), "127.0.0.1", 0, Nothing())
    yield opened
    opened.stop()


def test_a_port_listens_on_addresses_while_they_are_there(port: DataPort) -> None:
    assert find_own_address(f"{CABLE}:{port.port}") == ""
    port.listen_on([CABLE])
    assert port.further_hosts == (CABLE,)
    assert find_own_address(f"{CABLE}:{port.port}").startswith("127.")
    port.listen_on([])
    assert port.further_hosts == ()
    assert find_own_address(f"{CABLE}:{port.port}") == ""
    assert find_own_address(f"127.0.0.1:{port.port}") == "127.0.0.1"


def test_an_address_whose_port_is_taken_is_left_out_until_it_is_free(
    port: DataPort, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server((CABLE, port.port)):
        for _ in range(2):
            port.listen_on([CABLE, "127.0.0.3"])
        assert port.further_hosts == ("127.0.0.3",)
        assert caplog.text.count("data port: not opened") == 1
    port.listen_on([CABLE, "127.0.0.3"])
    assert sorted(port.further_hosts) == [CABLE, "127.0.0.3"]


def test_addresses_that_appear_later_are_found(port: DataPort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "DATA_HOSTS_S", 0.01)
    found, looked_again = list[str](), threading.Event()

    def find() -> list[str]:
        if port.further_hosts:
            looked_again.set()
        return found

    port.follow(find)
    assert port.further_hosts == ()
    found.append(CABLE)
    assert looked_again.wait(10)
    assert port.further_hosts == (CABLE,)
