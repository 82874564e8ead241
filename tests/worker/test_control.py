"""A worker's limits for a coordinator's requests: lengths of names, and the number of peers to dial."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from cluster.codec.cluster_state import decode_cluster_state, encode_cluster_state
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.snapshot import describe_workers
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.adapter import MAX_ADAPTERS
from cluster.core.cluster_state import ClusterState, ServingState
from cluster.core.json_types import to_json_types
from cluster.core.limits import KEPT_CORRECTIONS, LEARN_SHARE, MAX_KEPT, MAX_PATH_CHARS, MAX_STAGE_PEERS
from cluster.core.link_limits import MAX_DATA_HOSTS
from cluster.core.plan import Profile
from cluster.platform.macos import MachineFacts
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import WorkerServiceStub, add_WorkerServiceServicer_to_server
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.pipe_messages import Reported
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import WorkerSettings
from cluster.worker.stage_loader import StageLoader
from cluster.worker.supervisor import Supervisor
from cluster.worker.worker_service import WorkerServicer

PROFILE = Profile(bandwidth=1e11, layer_s=1e-4, step_s=1e-3, flops=1e12, row_cost=0.1)
LONG = "a" * (MAX_PATH_CHARS + 1)
PEERS = [pb.StorePeer(name="a", address="127.0.0.1:1")] * (MAX_STAGE_PEERS + 1)
REFUSED = [
    ("LoadStage", pb.LoadStageRequest(peers=PEERS)),
    ("LoadStage", pb.LoadStageRequest(keep=range(MAX_KEPT + 1))),
    ("UnloadStage", pb.UnloadStageRequest(keep=range(MAX_KEPT + 1))),
    *(("LoadStage", pb.LoadStageRequest(**{name: LONG})) for name in ("model", "path", "fingerprint", "instance")),
    ("SetAdapters", pb.SetAdaptersRequest(peers=PEERS)),
    ("SetAdapters", pb.SetAdaptersRequest(adapters=[pb.StageAdapter()] * (MAX_ADAPTERS + 1))),
    ("SetAdapters", pb.SetAdaptersRequest(adapters=[pb.StageAdapter(path=LONG)])),
    ("SetAdapters", pb.SetAdaptersRequest(adapters=[pb.StageAdapter(name="a" * 65, fingerprint="b" * 64)])),
    ("LearnRatio", pb.LearnRatioRequest(fingerprint=LONG, ratio=2.0)),
    ("MeasureLink", pb.MeasureLinkRequest(worker="a", address=LONG)),
    ("MeasureLink", pb.MeasureLinkRequest(worker="a", address="10.0.0.1:1", others=["mac.local:1"])),
    ("MeasureLink", pb.MeasureLinkRequest(worker="a", address="10.0.0.1:1", others=["10.0.0.2"])),
    ("LinkStage", pb.LinkStageRequest(pull_from="10.0.0.1:1", others=["10.0.0.2:1"] * (MAX_DATA_HOSTS + 1))),
]


@pytest.mark.anyio
async def test_long_names_and_too_many_places_are_refused_and_not_kept(tmp_path: Path) -> None:
    """Otherwise each heartbeat would report them, and could not be sent any more."""
    slots = EngineSlots(EngineLauncher([]))
    profile = ProfileFile(tmp_path / "profile.json", "k")
    profile.put(PROFILE)
    settings = WorkerSettings(name="ada", home=tmp_path)
    loader = StageLoader(tmp_path, LocalTrust())
    control = WorkerServicer("ab" * 8, settings, LocalTrust(), slots, loader, profile, MachineFacts())
    server = control_server(LocalTrust())
    add_WorkerServiceServicer_to_server(control, server)
    port = bind(server, LocalTrust(), "127.0.0.1", 0)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = WorkerServiceStub(channel)
        for method, request in REFUSED:
            call = getattr(stub, method)(request)
            with pytest.raises(grpc.RpcError) as caught:
                await (anext(aiter(call)) if method in ("LoadStage", "SetAdapters") else call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
        await stub.LearnRatio(pb.LearnRatioRequest(fingerprint="f", ratio=2.0))
    await server.stop(None)
    assert not control.slots.held
    assert profile.kept.profile.corrections == (("f", round(2.0**LEARN_SHARE, 4)),)


def test_no_more_corrections_are_read_than_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    ProfileFile(path, "k").put(PROFILE)
    facts = json.loads(path.read_text())
    facts["profile"]["corrections"] = [(f"f{number}", 2.0) for number in range(KEPT_CORRECTIONS + 1)]
    path.write_text(json.dumps(facts))
    learned = ProfileFile(path, "k").kept.profile.corrections
    assert len(learned) == KEPT_CORRECTIONS
    assert learned[-1] == (f"f{KEPT_CORRECTIONS}", 2.0)


@pytest.mark.anyio
async def test_what_the_system_says_of_a_machine_reaches_whoever_asks_for_the_status(tmp_path: Path) -> None:
    async def report() -> Reported:
        return Reported(0, 0, 0)

    slots = EngineSlots(EngineLauncher([]))
    slots.first.supervisor = cast(Supervisor, SimpleNamespace(hello=None, report=report, computing=False))
    profile, settings = ProfileFile(tmp_path / "profile.json", "k"), WorkerSettings(name="ada", home=tmp_path)
    loader, machine = StageLoader(tmp_path, LocalTrust()), MachineFacts(gpu_cores=40, macos_version="15.1")
    server = control_server(LocalTrust())
    servicer = WorkerServicer("ab" * 8, settings, LocalTrust(), slots, loader, profile, machine)
    add_WorkerServiceServicer_to_server(servicer, server)
    control = WorkerClient(LocalTrust(), f"127.0.0.1:{bind(server, LocalTrust(), '127.0.0.1', 0)}", "c0" * 8)
    await server.start()
    try:
        info, _ = await control.describe()
    finally:
        await control.close()
        await server.stop(None)
    state = ClusterState("c", "1", ServingState.IDLE, workers=describe_workers([RosterEntry(info)], []))
    (shown,) = to_json_types(decode_cluster_state(encode_cluster_state(state)))["workers"]
    assert (shown["name"], shown["gpu_cores"], shown["macos_version"]) == ("ada", 40, "15.1")


@pytest.mark.anyio
async def test_a_worker_is_busy_while_it_loads_and_while_its_engine_works(tmp_path: Path) -> None:
    """Otherwise its Mac may go to sleep."""
    settings = WorkerSettings(name="ada", home=tmp_path)
    slots = EngineSlots(EngineLauncher([]))
    supervisor = slots.first.supervisor

    class Loader:
        store_server = SimpleNamespace()

        async def stage(self, *_: object) -> AsyncIterator[pb.LoadStageResponse]:
            assert control.is_busy
            yield pb.LoadStageResponse()
            raise AssertionError("a reader that goes away ends the load")

    loader: Any = Loader()
    profile = ProfileFile(tmp_path / "profile.json", "k")
    control = WorkerServicer("ab" * 8, settings, LocalTrust(), slots, loader, profile, MachineFacts())
    assert not control.is_busy
    context: Any = None
    caller = {"coordinator": "c0", "instance": "i", "term": 1}
    await control.terms.answer(pb.GrantTermRequest(request=pb.TERM_REQUEST_GRANT, **caller))
    loading: Any = control.LoadStage(pb.LoadStageRequest(epoch=1, **caller), context)
    await anext(loading)
    assert control.is_busy
    await loading.aclose()
    assert not control.is_busy
    for report in (Reported(0, 0, sequences=1), Reported(0, 0, 0, busy_ms=20)):
        supervisor._last = report
        assert control.is_busy
    supervisor._last = Reported(0, 0, 0)
    assert not control.is_busy
