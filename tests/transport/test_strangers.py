"""Silent strangers on a gRPC port: they are refused or closed, and real callers are answered."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

from cluster.security.roles import Role
from cluster.transport import grpc_setup as options
from cluster.transport.grpc_setup import bind, control_channel, public_server
from parties import Lead

STRANGERS = 200
"""So many that gRPC ended the process one time in four, while the port gave it a new configuration for each of them."""


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def until(connections: list[socket.socket], count: int) -> None:
    deadline = time.monotonic() + 20
    while sum(map(closed, connections)) < count:
        assert time.monotonic() < deadline, sum(map(closed, connections))
        await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(lead: Lead, monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> AsyncIterator[str]:
    """A public port whose ``bound`` is another; its address."""
    assert bound in dict(options._PUBLIC_OPTIONS)
    monkeypatch.setattr(options, "_PUBLIC_OPTIONS", [*(dict(options._PUBLIC_OPTIONS) | {bound: value}).items()])
    trust = lead.trust(Role.COORDINATOR)
    server, checks = public_server(trust), health.HealthServicer()
    add_HealthServicer_to_server(checks, server)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    address = f"127.0.0.1:{bind(server, trust, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@pytest.fixture
def lead(tmp_path: Path) -> Lead:
    made = Lead.make(tmp_path)
    made.admit(Role.COORDINATOR, "lead", "c0" * 8)
    made.admit(Role.CLIENT, "cli", "a1" * 8)
    return made


def connected(stack: ExitStack, address: str) -> list[socket.socket]:
    host, port = address.split(":")
    return [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(STRANGERS)]


@pytest.mark.anyio
async def test_who_comes_too_many_is_turned_away(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    room = STRANGERS // 2
    async with serving(lead, monkeypatch, "grpc.max_allowed_incoming_connections", room) as address:
        with ExitStack() as stack:
            connections = connected(stack, address)
            await until(connections, STRANGERS - room)
            assert sum(map(closed, connections)) == STRANGERS - room


@pytest.mark.anyio
async def test_who_says_nothing_is_closed_and_a_caller_is_answered(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(lead, monkeypatch, "grpc.server_handshake_timeout_ms", 1000) as address:
        with ExitStack() as stack:
            await until(connected(stack, address), STRANGERS)
            channel = control_channel(lead.trust(Role.CLIENT), address, "coordinator")
            answer = await HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await channel.close(grace=None)
