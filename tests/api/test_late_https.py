"""HTTPS opens once its certificate comes from the Mac with the authority, which need not answer at the start."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.api import ports
from cluster.api.http import port_settings
from cluster.api.ports import HttpFront, serve_http
from cluster.coordinator.settings import HttpSettings, LoadOrder, ServeSettings
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.https import keep_http_certificate
from cluster.security.keyring import make_request
from cluster.security.roles import Role
from parties import Lead


class Reporter:
    def __init__(self) -> None:
        self.said: list[str] = []

    def problem(self, text: str) -> None:
        self.said.append(text)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.anyio
async def test_https_opens_when_its_certificate_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_settings, "is_loopback", lambda host: False)  # as on the network
    monkeypatch.setattr(ports, "HTTP_RETRY_S", 0.01)
    lead = Lead.make(tmp_path / "mac-1")
    lead.admit(Role.COORDINATOR, "mac-1-coordinator", "c1" * 8)
    lead.admit(Role.COORDINATOR, "mac-2-coordinator", "c2" * 8, tmp_path / "mac-2")
    folder = ClusterFolder(tmp_path / "mac-2", lead.folder.cluster)
    folder.write(folder.members, lead.folder.members.read_bytes())
    http = HttpSettings(("127.0.0.1", 0))
    settings = ServeSettings(LoadOrder("faq"), folder.home, cluster=folder.cluster, http=http)
    front, reporter = HttpFront(), Reporter()
    front.answer_by(answer)
    port = port_settings.http_port(settings)
    async with serve_http(settings, port, front, reporter):  # type: ignore[arg-type]
        assert not front.url
        (said,) = reporter.said
        assert said == "HTTP is off until its certificate comes from the Mac of mac-1-coordinator"
        key, request = make_request()
        certificate = lead.authority.sign_http(request, ["127.0.0.1"], time.time())
        keep_http_certificate(folder, key, certificate)
        async with asyncio.timeout(15):
            while not front.url:
                await asyncio.sleep(0.01)
        trusting = ssl.create_default_context(cadata=lead.authority.certificate.decode())
        async with httpx.AsyncClient(verify=trusting) as client:
            assert (await client.get(front.url)).text == "hello"
        assert front.url in reporter.said[-1]
    async with httpx.AsyncClient(verify=trusting) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(front.url)


@pytest.mark.anyio
async def test_one_that_never_gets_it_ends_with_its_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lead = Lead.make(tmp_path)
    settings = ServeSettings(LoadOrder("faq"), tmp_path, cluster=lead.folder.cluster, http=HttpSettings(("x", 0)))
    monkeypatch.setattr(ports, "http_port", lambda settings: waiting)
    waiting = port_settings.HttpPort(port_settings.http_port(settings).sites, None, None, "it has to come")
    front, reporter = HttpFront(), Reporter()
    async with asyncio.timeout(15), serve_http(settings, waiting, front, reporter):  # type: ignore[arg-type]
        await asyncio.sleep(0)
    assert not front.url
