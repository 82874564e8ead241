"""A coordinator lists and removes the models of a worker, over a real port, and its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import ModelInUse, ModelNotFound
from cluster.platform.macos import MachineFacts
from cluster.security.credentials import LocalTrust
from cluster.store.stored_models import list_models, remove_model, store_id
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import WorkerSettings
from cluster.worker.stage_loader import StageLoader
from cluster.worker.worker_service import WorkerServicer
from coordinator.test_cluster_stores import Macs, store
from fake_hub import FakeHub
from store.test_tensor_fetch import fetch, opened


@pytest.mark.anyio
async def test_the_coordinators_own_store_is_listed_unless_a_worker_shares_it(hub: FakeHub, tmp_path: Path) -> None:
    fingerprint = opened(tmp_path).fingerprint
    alone = Macs(tmp_path, mac_1=store("s1"))
    assert [one.mac for one in await alone.stores.list_stores()] == ["mac-1", "mac-9", "coordinator"]
    sharing = Macs(tmp_path, mac_1=store(store_id(tmp_path)))
    assert [one.mac for one in await sharing.stores.list_stores()] == ["mac-1", "mac-9"]
    (removed, _) = sorted(await alone.stores.remove([fingerprint]), key=lambda one: one.mac)
    assert (removed.mac, removed.model, removed.problem) == ("coordinator", "owner/tiny", "")
    assert list_models(tmp_path) == ()


@asynccontextmanager
async def worker(home: Path) -> AsyncIterator[tuple[WorkerServicer, WorkerClient]]:
    """Serve a worker without an engine on a real port."""
    slots = EngineSlots(EngineLauncher([]))
    loader, profile = StageLoader(home, LocalTrust()), ProfileFile(home / "profile.json", "k")
    settings = WorkerSettings(name="ada", home=home)
    servicer = WorkerServicer("ab" * 8, settings, LocalTrust(), slots, loader, profile, MachineFacts())
    server = control_server(LocalTrust())
    add_WorkerServiceServicer_to_server(servicer, server)
    control = WorkerClient(LocalTrust(), f"127.0.0.1:{bind(server, LocalTrust(), '127.0.0.1', 0)}", "c0" * 8)
    control.name = "ada"
    await server.start()
    try:
        yield servicer, control
    finally:
        await control.close()
        await server.stop(None)


@pytest.mark.anyio
async def test_a_worker_lists_and_removes_what_it_does_not_use(hub: FakeHub, tmp_path: Path) -> None:
    """It keeps models open for other Macs to read; that alone does not keep them on its disk."""
    partial = opened(tmp_path)
    fetch(tmp_path, partial, list(partial.tensors))
    fingerprint = partial.fingerprint
    async with worker(tmp_path) as (servicer, control):
        servicer.loader.store_server.share(partial.folder, partial)
        (listed,) = (await control.list_stored()).models
        assert (listed, listed.in_use) == (list_models(tmp_path)[0], True)
        with pytest.raises(ModelInUse, match="worker ada: a process of this Mac has the model"):
            await control.remove_stored(fingerprint)
        for wrong in ("", "../models", fingerprint[:12]):
            with pytest.raises(ModelNotFound, match="is not a model's fingerprint"):
                await control.remove_stored(wrong)
        del partial
        found = await control.list_stored()
        assert (found.mac, found.id) == ("ada", store_id(tmp_path))
        assert [(one.label, one.in_use) for one in found.models] == [("owner/tiny", False)]
        await control.remove_stored(fingerprint)
        assert (await control.list_stored()).models == ()


def test_only_a_fingerprint_is_removed(tmp_path: Path) -> None:
    (tmp_path / "models" / "refs").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match="'refs' is not a model's fingerprint"):
        remove_model(tmp_path, "refs")
    assert (tmp_path / "models" / "refs").is_dir()
