"""The coordinator's calls of a worker end with typed errors, whatever becomes of the channel."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from cluster.coordinator.worker_client import _map_rpc_errors, _read_with_stall_limit
from cluster.core.errors import WorkerLost, WorkerRefused
from cluster.v1 import worker_pb2 as pb


def test_a_channel_that_is_closed_under_a_call_is_a_loss_and_no_cancellation() -> None:
    """GRPC tells the call's task that it was cancelled, which nobody did."""

    async def call() -> None:
        async with _map_rpc_errors("ada", "127.0.0.1:1"):
            raise asyncio.CancelledError

    with pytest.raises(WorkerLost, match="worker ada was closed during a call") as caught:
        asyncio.run(call())
    assert caught.value.details == {"worker": "ada"}


REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to host: "


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (REFUSED + "Connection refused", WorkerRefused),
        (REFUSED + "connect: Connection refused (111)", WorkerRefused),
        (REFUSED + "Timeout occurred: refused-1", WorkerLost),
        ("DNS resolution failed for refused-1:7000: Connection refused by the server: try later", WorkerLost),
    ],
)
def test_only_a_closed_port_counts_as_a_refusal_whatever_the_mac_is_called(said: str, kind: type[WorkerLost]) -> None:
    async def call() -> None:
        async with _map_rpc_errors("refused-1", "127.0.0.1:1"):
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), said)

    with pytest.raises(WorkerLost) as caught:
        asyncio.run(call())
    assert type(caught.value) is kind


@pytest.mark.parametrize("news", [True, False])
def test_a_load_that_says_the_same_for_ever_ends(news: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.coordinator.worker_client.LOAD_STUCK_S", 0.0)

    class Call:
        """Says ten times how far it is, then that it is done."""

        said = 0

        async def read(self) -> object:
            await asyncio.sleep(0)
            self.said += 1
            done = self.said if news else 1
            return pb.LoadStageResponse(done_bytes=done) if self.said < 10 else grpc.aio.EOF

    async def load() -> int:
        return len([message async for message in _read_with_stall_limit(cast(Any, Call()), "ada")])

    if news:
        assert asyncio.run(load()) == 9
    else:
        with pytest.raises(WorkerLost, match="worker ada: the load made no progress"):
            asyncio.run(load())


def test_a_call_that_is_cancelled_stays_so() -> None:
    async def call() -> None:
        async with _map_rpc_errors("ada", "127.0.0.1:1"):
            await asyncio.sleep(3600)

    async def run() -> None:
        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
