"""Two workers measure how fast they add up as a group, with real engines over MLX's ring, and keep the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from cluster.coordinator.sum_measurement import find_sums, measure_sums
from cluster.coordinator.worker_client import WorkerClient
from cluster.coordinator.worker_messages import SumSeat
from cluster.core.all_reduce import FEW_BYTES, SumSource
from cluster.core.errors import Busy, InvalidRequest, StaleTerm
from cluster.core.group_limits import MAX_GROUP_KEY_CHARS
from cluster.core.worker import WorkerInfo
from cluster.platform.macos import MachineFacts
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from cluster.worker.engine_launcher import EngineLauncher, engine_command
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import WorkerSettings
from cluster.worker.stage_loader import StageLoader
from cluster.worker.worker_service import WorkerServicer

pytestmark = pytest.mark.anyio
COORDINATOR = "c0" * 8


def worker_info(name: str, address: str) -> WorkerInfo:
    return WorkerInfo(
        id=name, name=name, version="1", control_address=address, data_address=address, chip="", backend="cpu",
        mlx_version="1", memory_total=1, memory_limit=1, memory_used=0,
    )  # fmt: skip


class Mac:
    """A worker whose first engine never starts: a measurement has one of its own."""

    def __init__(self, name: str, home: Path) -> None:
        settings = WorkerSettings(name=name, home=home, host="127.0.0.1")
        self.slots = EngineSlots(EngineLauncher(engine_command(settings, None)))
        self.file = ProfileFile(home / f"{name}.json", "k")
        loader = StageLoader(home, LocalTrust())
        self._servicer = WorkerServicer(name, settings, LocalTrust(), self.slots, loader, self.file, MachineFacts())
        self._server = control_server(LocalTrust())
        add_WorkerServiceServicer_to_server(self._servicer, self._server)
        self.address = f"127.0.0.1:{bind(self._server, LocalTrust(), '127.0.0.1', 0)}"
        self.client = WorkerClient(LocalTrust(), self.address, COORDINATOR, "i", term=lambda: 1)
        self.info = worker_info(name, self.address)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        granted = pb.GrantTermRequest(request=pb.TERM_REQUEST_GRANT, coordinator=COORDINATOR, instance="i", term=1)
        await self._servicer.terms.answer(granted)
        await self._server.start()
        async with anyio.create_task_group() as tasks:
            self.slots._tasks = tasks
            yield
        await self.client.close()
        await self._server.stop(None)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[Mac]]:
    macs = [Mac(name, tmp_path) for name in ("ada", "bob")]
    async with macs[0].serving(), macs[1].serving():
        yield macs


async def test_a_group_is_measured_once_and_its_first_rank_keeps_the_result(pair: list[Mac]) -> None:
    infos, clients = [mac.info for mac in pair], [mac.client for mac in pair]
    assert await find_sums(infos, clients) is None
    found = await measure_sums(infos, clients, insecure=False)
    assert found
    assert found.source in (SumSource.MEASURED, SumSource.DISTURBED)
    assert found.included == FEW_BYTES
    assert found.is_possible
    assert await find_sums(infos, clients) == found
    assert await find_sums(infos[::-1], clients[::-1]) is None, "another rank leads that group"
    assert [len(list(mac.slots)) for mac in pair] == [1, 1], "the engines of a measurement end with it"


async def test_a_measurement_that_fails_leaves_no_engine_and_no_result(pair: list[Mac]) -> None:
    """One of two is asked, so the other never comes; and nobody may measure without the workers' term."""
    ada = pair[0]
    seat = SumSeat("ring ada bob", 0, 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_ask, ada.client, seat)
        while len(list(ada.slots)) < 2:
            await anyio.sleep(0.01)
        with pytest.raises(Busy):
            await _ask(ada.client, SumSeat("ring ada cyd", 0, 2))
        tasks.cancel_scope.cancel()
    while len(list(ada.slots)) > 1:
        await anyio.sleep(0.01)
    stranger = WorkerClient(LocalTrust(), ada.address, "c1" * 8)
    with pytest.raises(StaleTerm):
        await _ask(stranger, seat)
    await stranger.close()
    with pytest.raises(InvalidRequest):
        await _ask(ada.client, SumSeat("a" * (MAX_GROUP_KEY_CHARS + 1), 0, 2))
    assert ada.file.sums(seat.group) is None


async def _ask(client: WorkerClient, seat: SumSeat) -> None:
    async for _ in client.measure_sums(seat, 7):
        pass
