"""/metrics of a standby: it answers itself, as one that stands by, whoever leads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.api import following
from cluster.api.coordinator_process import CoordinatorProcess
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.port_settings import HttpPort
from cluster.api.ports import HttpFront
from cluster.coordinator.settings import LoadOrder, ServeSettings
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim, LeadershipState, StandbyState
from cluster.discovery.static import static_source
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import LocalTrust
from cluster.security.keys import KeyScope, KeyStore
from cluster.standby.standby import Standby

pytestmark = pytest.mark.anyio
LEADER = CoordinatorName("mac-1", "a", ("127.0.0.1:1",))
"""It answers nobody."""


@asynccontextmanager
async def standing_by(home: Path, keys: KeyStore | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, Standby]]:
    """The HTTP application of a standby, which runs no election, and whose leader does not answer."""
    settings = ServeSettings(LoadOrder("m"), home, cluster="lab", port=0)
    port = HttpPort(OriginPolicy(), keys, None)
    process = CoordinatorProcess.create(settings, static_source(()), LocalTrust(), port, HttpFront())
    process.others.hear(LeaderClaim(LEADER, CoordinatorRole.LEADER, 5, LEADER))
    parts: Any = (process.others, None, None, None, None)
    standby = Standby(*parts)
    transport = httpx.ASGITransport(process.front, raise_app_exceptions=False)
    async with (
        following._standby_port(process, LocalTrust(), standby),
        httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client,
    ):
        yield client, standby


async def test_it_tells_its_role_whom_it_follows_and_its_process_though_the_leader_is_silent(tmp_path: Path) -> None:
    async with standing_by(tmp_path) as (client, standby):
        reply = await client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=")
        lines = set(reply.text.splitlines())
        assert {"macpipe_leader 0.0", "macpipe_leader_term 5.0", "macpipe_follows_leader 0.0"} < lines
        assert "process_start_time_seconds" in reply.text
        me = standby._others.me
        own = StandbyState(me.name, me.addresses, in_sync=True)
        other = StandbyState(me.name, ("mac-3:7700",))
        standby.leadership = LeadershipState(CoordinatorRole.LEADER, 5, LEADER, standbys=(other, own))
        lines = set((await client.get("/metrics")).text.splitlines())
        assert {"macpipe_follows_leader 1.0", "macpipe_in_sync_with_leader 1.0"} < lines
        standby.leadership = LeadershipState(CoordinatorRole.LEADER, 5, LEADER, standbys=(other,))
        assert "macpipe_in_sync_with_leader 0.0" in (await client.get("/metrics")).text


async def test_it_needs_an_admins_key_and_an_allowed_host_as_the_leaders_does(tmp_path: Path) -> None:
    keys = KeyStore(ClusterFolder(tmp_path / "keys", "lab"))
    texts = {scope: keys.create(scope.value, scope)[1] for scope in KeyScope}
    async with standing_by(tmp_path, keys) as (client, _):
        assert (await client.get("/metrics")).status_code == 401
        for scope, status in ((KeyScope.INFERENCE, 403), (KeyScope.ADMIN, 200)):
            key = {"authorization": f"Bearer {texts[scope]}"}
            assert (await client.get("/metrics", headers=key)).status_code == status
        assert (await client.get("/metrics", headers={**key, "host": "evil.example"})).status_code == 403
        assert (await client.post("/metrics", headers=key)).status_code == 405
