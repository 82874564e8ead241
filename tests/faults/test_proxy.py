"""The proxy, between a plain client and an echo server."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from faults.proxy import Proxy, owner
from integration.daemons import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs loopback addresses beside 127.0.0.1")
HOST = "127.9.9.9"


def echo(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.fixture
def proxied() -> Iterator[tuple[Proxy, socket.socket]]:
    port = free_port()
    listener = echo(port)
    proxy = Proxy(lambda port, there: "caller", random.Random(1))
    proxy.listen(HOST, port, "server", data=True)
    client = socket.create_connection((HOST, port), 5)
    yield proxy, client
    client.close()
    proxy.close()
    listener.close()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_socket_has_an_owner_in_either_family(family: socket.AddressFamily) -> None:
    """GRPC speaks IPv4 through sockets of the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(family) as caller:
        mapped = "::ffff:127.0.0.1" if family == socket.AF_INET6 else "127.0.0.1"
        there = listener.getsockname()[1]
        caller.connect((mapped, there))
        port = caller.getsockname()[1]
        assert owner(port, there, {1: "init", os.getpid(): "me"}) == "me"
        assert owner(port, there, {1: "init"}) == ""
        assert owner(port, there + 1, {os.getpid(): "me"}) == ""


def said(client: socket.socket, data: bytes, timeout_s: float = 20.0) -> bytes:
    """Return what comes back in time."""
    client.settimeout(timeout_s)
    client.sendall(data)
    back = b""
    with suppress(TimeoutError):
        while len(back) < len(data):
            back += client.recv(65536)
    return back


def test_it_passes_on_what_comes(proxied: tuple[Proxy, socket.socket]) -> None:
    _, client = proxied
    data = random.Random(2).randbytes(300_000)
    assert said(client, data) == data


@pytest.mark.parametrize("receiver", ["server", "caller"])
def test_a_cut_holds_everything_until_it_is_healed(proxied: tuple[Proxy, socket.socket], receiver: str) -> None:
    proxy, client = proxied
    proxy.link("caller", "server").blocked.add(receiver)
    assert said(client, b"x" * 500, 0.3) == b""
    proxy.heal()
    client.settimeout(20)
    assert client.recv(500)


def test_delay_and_throttle_slow_it_down(proxied: tuple[Proxy, socket.socket]) -> None:
    proxy, client = proxied
    link = proxy.link("caller", "server")
    link.delay_s, began = 0.1, time.monotonic()
    assert said(client, b"x" * 500) == b"x" * 500
    assert time.monotonic() - began >= 0.2
    link.delay_s, link.rate, began = 0.0, 1e6, time.monotonic()
    assert len(said(client, bytes(200_000))) == 200_000
    assert time.monotonic() - began >= 0.15


def test_damage_is_one_bit(proxied: tuple[Proxy, socket.socket]) -> None:
    proxy, client = proxied
    proxy.link("caller", "server").corrupt = 1
    data = bytes(1000)
    back = said(client, data)
    assert sum(bin(a ^ b).count("1") for a, b in zip(data, back, strict=True)) == 1


def test_a_reset_ends_connections(proxied: tuple[Proxy, socket.socket]) -> None:
    proxy, client = proxied
    assert said(client, b"hello") == b"hello"
    assert proxy.reset("caller", "server") == 1
    with suppress(ConnectionError):
        assert client.recv(100) == b""
