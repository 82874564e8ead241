"""A slow worker gets longer deadlines for answers and connections."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cluster import __version__
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.roster import MLX_LM, Roster
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.limits import GONE_S
from cluster.core.worker import WorkerInfo
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import PING_S, control_channel

ADDRESS, TAKES_S = "127.0.0.1:1", 0.15
FACTS = WorkerInfo(
    "i", "ada", __version__, ADDRESS, ADDRESS, "", "", f"0 mlx-lm {MLX_LM}", 1, 1, cluster="c", lag_seconds=0.5
)


class Slow:
    """A worker whose answer takes ``TAKES_S``; a caller with a shorter deadline never gets one."""

    def __init__(self) -> None:
        self.asked_for: list[float] = []

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        self.asked_for.append(timeout_s)
        await asyncio.sleep(min(timeout_s, TAKES_S))
        if timeout_s < TAKES_S:
            raise WorkerLost("worker ada does not answer", worker="ada")
        return FACTS, ""


def test_a_worker_that_answers_late_is_heard_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.coordinator.heartbeat.GONE_S", 0.04)
    monkeypatch.setattr("cluster.coordinator.heartbeat.HEARTBEAT_S", 0.01)
    slow = Slow()
    roster = Roster(static_source([ADDRESS]), "c", "me", LocalTrust())
    monkeypatch.setattr(roster, "control", lambda address: cast(Any, slow))

    async def body() -> None:
        watch = HeartbeatMonitor(roster, lambda belief: None, tuple)
        watch.start()
        while not watch.members():
            await asyncio.sleep(0.01)
        assert slow.asked_for == [0.04, 0.08, 0.16]
        assert watch.lag() == FACTS.lag_seconds
        await watch.close()

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_slow_worker_gets_longer_for_pings_until_it_is_quick_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pings: list[float] = []

    def dial(trust: Any, address: str, peer: str, ping_s: float) -> Any:
        pings.append(ping_s)
        return control_channel(trust, address, peer, ping_s)

    monkeypatch.setattr("cluster.coordinator.worker_client.control_channel", dial)

    async def body() -> None:
        control = WorkerClient(LocalTrust(), ADDRESS, "me")
        for timeout_s in (GONE_S, 2 * GONE_S, 4 * GONE_S, 8 * GONE_S, GONE_S):
            with pytest.raises(MacpipeError):  # nobody listens there
                await control.describe(timeout_s)
        await control.close()

    asyncio.run(body())
    assert pings == [PING_S, 4 * PING_S, PING_S]
