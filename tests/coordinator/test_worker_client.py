"""Calls to a worker end with typed errors, whatever happens to the channel."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from cluster.coordinator.worker_client import WorkerClient, _map_rpc_errors, _read_with_stall_limit
from cluster.coordinator.worker_messages import SumSeat
from cluster.core.errors import InvalidRequest, WorkerLost, WorkerRefused
from cluster.core.limits import KEPT_CORRECTIONS, MAX_ANSWER_BYTES
from cluster.core.worker import WorkerInfo
from cluster.membership.terms import Process, Term, TermCall, TermRequest
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from cluster.worker.stage_loader import _batches


def test_a_channel_that_is_closed_under_a_call_is_a_loss_and_no_cancellation() -> None:
    """Its task is cancelled by gRPC, although nobody cancelled it."""

    async def call() -> None:
        async with _map_rpc_errors("ada", "127.0.0.1:1"):
            raise asyncio.CancelledError

    with pytest.raises(WorkerLost, match="worker ada was closed during a call") as caught:
        asyncio.run(call())
    assert caught.value.details == {"worker": "ada"}


@pytest.mark.anyio
async def test_calls_of_a_worker_that_was_forgotten_are_losses() -> None:
    """A worker that comes back on another port is forgotten at its old one, which some task may still ask."""
    control = WorkerClient(LocalTrust(), "127.0.0.1:1", "c0" * 8)
    await control.close()
    term = TermCall(TermRequest.RENEW, control.address, Term(1, Process("c0" * 8, "1")), 0.0)
    for call in (control.request_term(term), control.unload(1), control.measure_sums(SumSeat("", 0, 2)).__anext__()):
        with pytest.raises(WorkerLost, match="is closed: it is no more at"):
            await call


@pytest.mark.anyio
async def test_a_worker_that_was_forgotten_is_not_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next connection would stay open: nobody closes a client twice."""
    trust = LocalTrust()
    control = WorkerClient(trust, "127.0.0.1:1", "c0" * 8)
    await control.close()
    with pytest.raises(WorkerLost, match="is closed: it is no more at"):
        await control.describe(60.0)  # with the patience for a slow worker, which needs other pings
    monkeypatch.setattr(LocalTrust, "serial", 7)  # the certificate was renewed
    with pytest.raises(WorkerLost, match="is closed: it is no more at"):
        await control.describe()


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
        """Reports progress ten times, then that it is done."""

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


class Talker(WorkerServiceServicer):
    """Describes itself with that many corrections."""

    def __init__(self, corrections: int) -> None:
        self._said = pb.DescribeResponse(id="ab" * 8, name="ada", profile=pb.Profile(bandwidth=1.0))
        self._said.profile.corrections.extend([pb.Ratio(fingerprint="f", ratio=1.0)] * corrections)

    async def Describe(self, request: object, context: object) -> pb.DescribeResponse:
        return self._said


async def described(corrections: int) -> WorkerInfo:
    trust = LocalTrust()
    server = control_server(trust)
    add_WorkerServiceServicer_to_server(Talker(corrections), server)
    port = bind(server, trust, "127.0.0.1", 0)
    await server.start()
    control = WorkerClient(trust, f"127.0.0.1:{port}", "c0" * 8)
    try:
        return (await control.describe())[0]
    finally:
        await control.close()
        await server.stop(None)


@pytest.mark.anyio
async def test_a_worker_that_tells_too_much_of_itself_is_refused_or_has_no_profile() -> None:
    """16 MiB of empty corrections kept the coordinator's event loop for 1.5 s and took 750 MiB."""
    assert len((await described(KEPT_CORRECTIONS)).profile.corrections) == KEPT_CORRECTIONS
    assert not (await described(KEPT_CORRECTIONS + 1)).profile.known
    with pytest.raises(InvalidRequest, match="is too large"):
        await described(MAX_ANSWER_BYTES // 10)


def test_a_slices_digests_come_in_messages_that_may_be_sent() -> None:
    names = [f"model.layers.{i % 64}.mlp.experts.{i}.gate_proj.scales" for i in range(5_000)]
    batches = list(_batches(dict.fromkeys([*names, "a" * MAX_ANSWER_BYTES, "b"], "ab" * 32)))
    assert [one.name for batch in batches for one in batch] == [*names, "a" * MAX_ANSWER_BYTES, "b"]
    sizes = [pb.LoadStageResponse(digests=batch).ByteSize() for batch in batches]
    assert sorted(sizes)[-2] <= MAX_ANSWER_BYTES // 2
    assert len(batches) < 8


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
