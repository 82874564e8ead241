"""Ports for processes that this one starts: nobody else gets them in the time until those listen."""

from __future__ import annotations

import socket

import pytest

from cluster.cli import process_group
from cluster.cli.process_group import reserve_port
from cluster.core.errors import MacpipeError

HOST = "127.0.0.1"


def allow_only(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "RESERVABLE", range(port, port + 1))
    monkeypatch.setattr(process_group, "RESERVE_ATTEMPTS", 1)


def test_a_reserved_port_is_refused_to_others_and_can_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserve_port(HOST) as port:
        allow_only(port, monkeypatch)
        with pytest.raises(MacpipeError), reserve_port(HOST):
            pass
        for _ in range(2):
            socket.create_server((HOST, port)).close()


def test_a_port_that_is_listened_on_is_not_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as listener:
        allow_only(listener.getsockname()[1], monkeypatch)
        with pytest.raises(MacpipeError, match=HOST), reserve_port(HOST):
            pass


def test_what_the_block_raises_is_not_taken_for_a_port_in_use() -> None:
    with pytest.raises(ConnectionResetError), reserve_port(HOST):
        raise ConnectionResetError
