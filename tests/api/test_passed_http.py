"""The HTTP port of a standby: the leader answers, as if it had been asked itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse

from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.errors import HANDLERS
from cluster.api.http.json_response import Json
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.server import listen, serve
from cluster.api.passing.http_answers import answer_passed
from cluster.api.passing.leader_channel import LeaderChannel
from cluster.api.passing.passed_http import passing_application
from cluster.core.errors import Busy
from cluster.core.leadership import CoordinatorName
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, public_server
from cluster.v1.leader_pb2_grpc import LeaderServiceServicer, add_LeaderServiceServicer_to_server

pytestmark = pytest.mark.anyio
ORIGINS = OriginPolicy(frozenset({"mac-2.local"}), frozenset({"https://chat.example"}))


class Leader(LeaderServiceServicer):
    """A leader whose application tells what it sees. ``left`` is set once a stream's client has left."""

    def __init__(self) -> None:
        self.left, self.streaming, self.vanish = asyncio.Event(), asyncio.Event(), False
        paths = {"/echo": self.echo, "/busy": self.busy, "/stream": self.stream}
        routes = [
            DeclaredRoute(path, endpoint, access=Access.INFERENCE, methods=["GET", "POST"])
            for path, endpoint in paths.items()
        ]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        self.app = RequestMiddleware(app, lambda *_: None, Authorizer(routes)).behind_standby()

    async def PassHttp(self, request_iterator: Any, context: Any) -> None:
        await answer_passed(self.app, request_iterator, context)

    async def echo(self, request: Request) -> Json:
        seen = {
            "method": request.method,
            "query": str(request.url.query),
            "headers": dict(request.headers),
            "client": request.client.host if request.client else "",
            "body": (await request.body()).decode(),
        }
        return Json(seen)

    async def busy(self, request: Request) -> Json:
        raise Busy("the queue is full", retry_after_s=7.0)

    async def stream(self, request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                yield b"data: 1\n\n"
                self.streaming.set()
                await asyncio.sleep(3600)
            finally:
                self.left.set()

        return StreamingResponse(pieces(), media_type="text/event-stream")


@asynccontextmanager
async def standby(leader: Leader | None, *, stop: asyncio.Event | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A standby's HTTP port before ``leader``, on real sockets. The leader ends once ``stop`` is set."""
    server = public_server(LocalTrust())
    add_LeaderServiceServicer_to_server(leader or LeaderServiceServicer(), server)
    address = f"127.0.0.1:{bind(server, LocalTrust(), '127.0.0.1', 0)}"
    await server.start()

    async def end() -> None:
        if stop:
            await stop.wait()
            await server.stop(None)

    ending = asyncio.create_task(end())
    name = CoordinatorName("mac-1", "1", (address,)) if leader else None
    app = passing_application(LeaderChannel(LocalTrust(), lambda: name), ORIGINS)
    async with serve(app, listen("127.0.0.1", 0)) as port, httpx.AsyncClient(base_url=f"http://{port}") as client:
        yield client
    ending.cancel()
    await server.stop(None)


async def test_requests_are_answered_by_the_leader_which_sees_who_asks() -> None:
    async with standby(Leader()) as client:
        large = "x" * 300_000
        headers = {"authorization": "Bearer mpk_1", "x-request-id": "mine"}
        response = await client.post("/echo?a=%20b", content=large, headers=headers)
        seen = response.json()
        assert (response.status_code, response.headers["x-request-id"]) == (200, "mine")
        assert (seen["method"], seen["query"], seen["client"]) == ("POST", "a=%20b", "127.0.0.1")
        assert seen["headers"]["authorization"] == "Bearer mpk_1"
        assert seen["body"] == large
        refused = await client.get("/busy")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert (await client.get("/nothing")).status_code == 404


async def test_host_and_origin_are_checked_by_the_standby_and_its_names_are_allowed() -> None:
    async with standby(Leader()) as client:
        assert (await client.get("/echo", headers={"host": "mac-2.local"})).status_code == 200
        assert (await client.get("/echo", headers={"host": "evil.example"})).status_code == 403
        assert (await client.get("/echo", headers={"origin": "https://evil.example"})).status_code == 403
        allowed = await client.get("/echo", headers={"origin": "https://chat.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        smuggled = {"content-length": "5", "transfer-encoding": "chunked"}
        async with client.stream("POST", "/echo", content=b"0\r\n\r\n", headers=smuggled) as ambiguous:
            assert (ambiguous.status_code, ambiguous.headers["connection"]) == (400, "close")


async def test_a_client_that_leaves_ends_its_stream_at_the_leader() -> None:
    leader = Leader()
    async with standby(leader) as client:
        async with client.stream("POST", "/stream", json={}) as response:
            assert await anext(response.aiter_bytes()) == b"data: 1\n\n"
        await asyncio.wait_for(leader.left.wait(), 10)


async def test_a_leader_that_is_lost_ends_the_stream_early() -> None:
    leader, stop = Leader(), asyncio.Event()
    async with standby(leader, stop=stop) as client, client.stream("GET", "/stream") as response:
        pieces = response.aiter_bytes()
        assert await anext(pieces) == b"data: 1\n\n"
        stop.set()
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)


async def test_nobody_who_leads_is_told() -> None:
    async with standby(None) as client:
        response = await client.get("/echo")
        assert response.status_code == 503
        assert "none leads" in response.json()["error"]["message"]
        assert float(response.headers["retry-after"]) > 0
