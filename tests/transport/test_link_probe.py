"""A link is measured against a real data port, and probes of that port are bounded."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.errors import Unreachable
from cluster.core.link_limits import PROBE_BYTES, PROBE_MESSAGES, PROBES
from cluster.security.credentials import LocalTrust
from cluster.security.trust import WORKER
from cluster.transport.grpc_setup import data_channel
from cluster.transport.grpc_streams import DataServer
from cluster.transport.link_probe import PROBE, measure_link
from cluster.transport.streams import Line


class Nothing:
    """A data port without a stage."""

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> None:
        return None

    def received(self, message: bytes) -> None:
        raise AssertionError(message)


@pytest.fixture
def port() -> Any:
    server = DataServer(LocalTrust(), "127.0.0.1", 0, Nothing())
    yield server.port
    server.stop()


def test_a_link_has_a_round_trip_and_a_bandwidth(port: int) -> None:
    link = measure_link(LocalTrust(), f"127.0.0.1:{port}")
    assert 0 < link.round_trip_s < 1
    assert link.bandwidth > 1e6
    assert link.hop_s(0) == link.round_trip_s / 2


def test_a_port_gives_no_more_than_the_bound(port: int) -> None:
    most = (2**32 - 1).to_bytes(4, "little")
    with data_channel(LocalTrust(), f"127.0.0.1:{port}", WORKER) as channel:
        sizes = [len(m) for m in channel.stream_stream(PROBE, None, None)(iter([most] * 100), timeout=20)]
    assert sizes == [PROBE_BYTES] * (PROBES + PROBE_MESSAGES + 1)


def test_nobody_there() -> None:
    with pytest.raises(Unreachable, match="cannot measure"):
        measure_link(LocalTrust(), "127.0.0.1:1")
