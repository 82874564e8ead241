"""The HTTP port of a standby: the leader answers, as if it had been asked itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api.grpc.leader_service import LeaderServicer
from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.errors import HANDLERS, openai_error
from cluster.api.http.json_response import Json
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.passed_answer import PART, SILENCE, PassedAnswer, passed_answer
from cluster.api.http.server import listen, serve
from cluster.api.http.sse import COMMENT, EVENTS, EventStream, event
from cluster.api.http.standby_routes import standby_routes
from cluster.api.metrics import ProcessMetrics
from cluster.api.passing.leader_channel import LeaderChannel
from cluster.api.passing.passed_http import passing_application
from cluster.core.errors import AnswerLost, Busy, InvalidRequest, MacpipeError, NotServing
from cluster.core.leadership import CoordinatorName, FollowingState
from cluster.security.credentials import LocalTrust
from cluster.security.roles import Role
from cluster.security.trust import Trust
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.grpc_setup import bind, public_server
from cluster.v1.leader_pb2_grpc import LeaderServiceServicer, add_LeaderServiceServicer_to_server
from parties import Lead

pytestmark = pytest.mark.anyio
ORIGINS = OriginPolicy(frozenset({"mac-2.local"}), frozenset({"https://chat.example"}))


PIECES = (b"data: 1\n\n", b": still working\n\n", b"data: 2\n\n", b"event: ping\ndata: {}\n\n", b"data: 3\n\n")
WHOLE = b"data: 1\n\ndata: 2\n\ndata: 3\n\n"
CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/messages", "/api/chat")
ANTHROPIC_LOST = b'{"type":"error","error":{"type":"overloaded_error","message":"lost"}}'
LOADING = NotServing("the model is being loaded")


Part = tuple[int, bytes]
FIRST: tuple[Part, ...] = ((0, b"data: begin\n\n"), (1, b"data: a1\n\n"), (2, b"data: b1\n\n"), (1, b"data: a2\n\n"))
SECOND: tuple[Part, ...] = (
    *((0, b"data: begin\n\n"), (2, b"data: b1\n\n"), (2, b"data: b2\n\n"), (1, b"data: a1\n\n")),
    *((1, b"data: a2\n\n"), (1, b"data: a3\n\n"), (0, b"data: end\n\n")),
)
"""An answer of two samples as two leaders stream it: the samples' events come in another order."""


class Encoder:
    """The format of a stream that begins before its answer."""

    def begin(self) -> Iterator[bytes]:
        yield FIRST[0][1]

    def encode(self, e: object) -> Iterator[bytes]:
        yield from ()

    end = begin

    def idle(self) -> bytes:
        return COMMENT

    def fail(self, error: MacpipeError) -> bytes:
        return event(openai_error(error))


class Leader(LeaderServiceServicer):
    """A leader whose application tells what it sees, and streams ``pieces``, of which it sends ``most`` at once.

    It refuses the first ``refusals`` streams, and with ``late`` any that has begun. ``left`` is set once a stream's
    client has left, ``passed`` has what the standby said of each answer, ``begun`` and ``ended`` are set by the first
    request. ``leaving`` is set once it leads no more, which is in the midst of its first answer if it ``leaves``.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | Part] = PIECES,
        most: int | None = None,
        refusals: int = 0,
        refusal: MacpipeError = LOADING,
        *,
        late: bool = False,
        leaves: bool = False,
    ) -> None:
        self.left = asyncio.Event()
        self.parts = [piece if isinstance(piece, tuple) else (0, piece) for piece in pieces]
        self.most, self.refusals, self.refusal, self.late = most, refusals, refusal, late
        self.passed: list[PassedAnswer] = []
        paths = {
            "/echo": self.echo,
            "/health": self.echo,
            "/busy": self.busy,
            **dict.fromkeys((*ROUTES, "/other"), self.stream),
        }
        routes = [
            DeclaredRoute(path, endpoint, access=Access.INFERENCE, methods=["GET", "POST"])
            for path, endpoint in paths.items()
        ]
        app: ASGIApp = Starlette(routes=routes, exception_handlers=HANDLERS)
        app = RequestMiddleware(app, lambda *_: None, Authorizer(routes)).behind_standby()
        others: Any = None
        self.leaves, self.leaving, self.begun, self.ended = leaves, *(asyncio.Event() for _ in range(3))
        self.service = LeaderServicer(others, Path(), "default", http=app, leaving=self.leaving)

    async def PassHttp(self, request_iterator: Any, context: Any) -> None:
        self.begun.set()
        try:
            await self.service.PassHttp(request_iterator, context)
        finally:
            self.ended.set()

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

    async def stream(self, request: Request) -> ASGIApp:
        try:
            assert json.loads(await request.body()) == {"stream": True}
        except ValueError:
            raise InvalidRequest("the body is cut off: the call was lost") from None
        passed = passed_answer(request)
        assert passed
        self.passed.append(passed)
        if self.leaves:
            self.leaving.set()
            raise NotServing("the coordinator is stopping")
        if self.refusals:
            self.refusals -= 1
            raise self.refusal
        if self.late:
            return EventStream(self._refuse(), Encoder(), "r", early=True)
        return self._send_parts

    @asynccontextmanager
    async def _refuse(self) -> AsyncIterator[AsyncIterator[Any]]:
        raise self.refusal
        yield

    async def _send_parts(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", EVENTS)]})
        try:
            for part, piece in self.parts[: self.most]:
                await send({"type": "http.response.body", "body": piece, "more_body": True, PART: part})
            if self.most is not None:
                await asyncio.sleep(3600)
        finally:
            self.left.set()
        await send({"type": "http.response.body", "body": b""})


class Service:
    """The leaders that a standby may know, one after the other. ``end`` stops the one that leads."""

    def __init__(self, *leaders: Leader, trust: Trust | None = None) -> None:
        self._leaders, self._trust = list(leaders), trust or LocalTrust()
        self._server: Any = None
        self.name: CoordinatorName | None = None

    async def begin(self) -> None:
        """Have the next leader lead."""
        self._server = public_server(self._trust)
        add_LeaderServiceServicer_to_server(self._leaders.pop(0), self._server)
        address = f"127.0.0.1:{bind(self._server, self._trust, '127.0.0.1', 0)}"
        await self._server.start()
        self.name = CoordinatorName("mac-1", address, (address,))

    async def end(self) -> None:
        """Stop the leader at once. Then nobody leads."""
        if self._server:
            self.name = None
            await self._server.stop(None)


@asynccontextmanager
async def standby(
    service: Service, wait_s: float = 0.2, trust: Trust | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A standby's HTTP port before a service, on real sockets."""
    channel = LeaderChannel(trust or LocalTrust(), lambda: service.name)
    own = standby_routes(lambda: FollowingState(0, None, False, False), ProcessMetrics(0.0), None, ORIGINS)
    app = passing_application(channel, ORIGINS, ByteBudget(), wait_s, own)
    async with (
        serve(app, listen("127.0.0.1", 0)) as port,
        httpx.AsyncClient(base_url=f"http://{port}", timeout=60) as client,
    ):
        yield client
    await service.end()


@asynccontextmanager
async def passing(leader: Leader) -> AsyncIterator[httpx.AsyncClient]:
    """A standby's HTTP port before one leader."""
    service = Service(leader)
    await service.begin()
    async with standby(service) as client:
        yield client


async def test_requests_are_answered_by_the_leader_which_sees_who_asks() -> None:
    async with passing(Leader()) as client:
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
        unread = await client.post("/busy", content=large)
        assert unread.status_code == 429, "the leader answers before it has read all"


async def test_host_and_origin_are_checked_by_the_standby_and_its_names_are_allowed() -> None:
    async with passing(Leader()) as client:
        assert (await client.get("/echo", headers={"host": "mac-2.local"})).status_code == 200
        assert (await client.get("/echo", headers={"host": "evil.example"})).status_code == 403
        assert (await client.get("/echo", headers={"origin": "https://evil.example"})).status_code == 403
        allowed = await client.get("/echo", headers={"origin": "https://chat.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        smuggled = {"content-length": "5", "transfer-encoding": "chunked"}
        async with client.stream("POST", "/echo", content=b"0\r\n\r\n", headers=smuggled) as ambiguous:
            assert (ambiguous.status_code, ambiguous.headers["connection"]) == (400, "close")


async def test_a_client_that_leaves_ends_its_stream_at_the_leader() -> None:
    leader = Leader(most=1)
    async with passing(leader) as client:
        async with client.stream("POST", CHAT, json={"stream": True}) as response:
            assert await anext(response.aiter_bytes()) == PIECES[0]
        await asyncio.wait_for(leader.left.wait(), 10)


async def read(client: httpx.AsyncClient, service: Service, first: Leader, path: str = CHAT) -> bytes:
    """Read a stream whose leader is lost after the pieces that it sends. Return what the client received."""
    received = b""
    async with client.stream("POST", path, json={"stream": True}) as response:
        pieces = response.aiter_bytes()
        sent = len(b"".join(piece for _, piece in first.parts[: first.most]))
        while len(received) < sent:
            received += await anext(pieces)
        await service.end()
        following = asyncio.create_task(service.begin())
        async for piece in pieces:
            received += piece
        await following
    return received


def openai_end(received: bytes) -> dict[str, Any]:
    """The error in the last event of a stream in OpenAI's format."""
    error: dict[str, Any] = json.loads(received.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]
    return error


@pytest.mark.parametrize("most", [1, 2, 4])
async def test_a_stream_goes_on_at_the_next_leader_behind_what_the_client_has(most: int) -> None:
    first, second = Leader(most=most), Leader(refusals=1)
    service = Service(first, second)
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    for silence in (PIECES[1], PIECES[3]):
        received = received.replace(silence, b"")
    assert received == WHOLE
    (begun,), (_, resumed) = first.passed, second.passed
    assert (begun.request_id, begun.created, begun.resumed) == (resumed.request_id, resumed.created, False)
    assert resumed.resumed
    assert resumed.events == (2 if most == 4 else 1)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
async def test_samples_go_on_whatever_their_order_is_at_the_next_leader(most: int) -> None:
    service = Service(first := Leader(FIRST, most), second := Leader(SECOND))
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    events = received.split(b"\n\n")[:-1]
    for sample in (b"data: a", b"data: b"):
        wanted = [piece[:-2] for _, piece in SECOND if piece.startswith(sample)]
        assert [one for one in events if one.startswith(sample)] == wanted
    assert (events[0], events[-1], len(events)) == (b"data: begin", b"data: end", len(SECOND))
    assert second.passed[0].events == most


async def test_a_stream_that_waited_for_its_model_begins_its_answer_at_the_next_leader() -> None:
    begin, idle, rest = (0, b"data: begin\n\n"), (SILENCE, b"data: nothing yet\n\n"), (1, b"data: a1\n\n")
    first, second = Leader((begin, idle, idle), most=3), Leader((begin, idle, rest))
    service = Service(first, second)
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    assert received == b"".join(piece for _, piece in (begin, idle, idle, idle, rest))
    (resumed,) = second.passed
    assert (resumed.resumed, resumed.events, resumed.is_begun) == (True, 1, False)


async def test_a_sample_with_other_events_is_not_continued(caplog: pytest.LogCaptureFixture) -> None:
    other = [(part, piece.replace(b"b1", b"b9")) for part, piece in SECOND]
    service = Service(first := Leader(FIRST, 3), Leader(other))
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    assert b"b9" not in received
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert openai_end(received)["code"] == "answer_differs"


@pytest.mark.parametrize("pieces", [(b"data: 9\n\n", *PIECES[1:]), ()], ids=["others", "fewer"])
async def test_a_leader_with_another_answer_does_not_continue_it(pieces: Sequence[bytes]) -> None:
    first = Leader(most=3)
    service = Service(first, Leader(pieces))
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    assert received.startswith(b"".join(PIECES[:3]))
    assert openai_end(received)["code"] == "answer_differs"


@pytest.mark.parametrize(
    ("path", "end"),
    [
        (CHAT, b'data: {"error":{"message":"lost","type":"server_error","param":null,"code":"answer_lost"}}\n\n'),
        (
            "/v1/messages",
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"lost"}}\n\n',
        ),
        ("/api/chat", b'{"error":"lost"}\n'),
    ],
)
async def test_a_stream_that_the_next_leader_lacks_ends_with_the_reason(path: str, end: bytes) -> None:
    first, second = Leader(most=1), Leader(refusals=1, refusal=AnswerLost("lost"))
    service = Service(first, second)
    await service.begin()
    async with standby(service) as client:
        assert await read(client, service, first, path) == PIECES[0] + end
    assert len(second.passed) == 1, "it is not asked again"


async def test_a_stream_that_waits_for_its_model_at_the_next_leader_ends_with_the_reason_once() -> None:
    first, second = Leader(FIRST, most=2), Leader(late=True, refusal=AnswerLost("lost"))
    service = Service(first, second)
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first)
    assert received.startswith(FIRST[0][1] + FIRST[1][1])
    assert received.count(b"data: ") == 3
    assert openai_end(received)["code"] == "answer_lost"


@pytest.mark.parametrize("hands_over", [False, True])
async def test_a_request_whose_body_comes_after_its_leader_was_lost_is_answered_by_the_next(
    hands_over: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Leader(), Leader()
    service, next_leads = Service(first, second), asyncio.Event()
    await service.begin()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"stream"'
        await next_leads.wait()
        yield b": true}"

    async with standby(service) as client:
        asking = asyncio.create_task(client.post(CHAT, content=body(), headers={"content-type": "application/json"}))
        await asyncio.wait_for(first.begun.wait(), 10)
        if hands_over:
            first.leaving.set()
            await asyncio.wait_for(first.ended.wait(), 10)
            assert not [record for record in caplog.records if record.levelname == "ERROR"]
        await service.end()
        await service.begin()
        await asyncio.wait_for(second.begun.wait(), 10)
        next_leads.set()
        answered = await asyncio.wait_for(asking, 15)
    assert answered.content == b"".join(PIECES)
    assert not first.passed


async def test_what_may_have_changed_something_is_not_sent_to_the_next_leader() -> None:
    first, second = Leader(most=1), Leader()
    service = Service(first, second)
    await service.begin()
    async with standby(service) as client:
        received = await read(client, service, first, "/other")
    assert openai_end(received)["code"] == "connection_lost"
    assert not second.passed


async def test_an_error_of_a_leader_that_leads_no_more_is_not_the_response() -> None:
    leader = Leader(leaves=True)
    service = Service(leader, Leader())
    await service.begin()
    async with standby(service) as client:
        asked = asyncio.create_task(client.post(CHAT, json={"stream": True}))
        async with asyncio.timeout(15):
            await leader.leaving.wait()
        await service.end()
        await service.begin()
        response = await asked
        assert (response.status_code, [one.request_id for one in leader.passed]) == (200, [leader.passed[0].request_id])


async def test_a_new_request_waits_a_moment_for_a_leader() -> None:
    service = Service(Leader())
    async with standby(service) as client:
        response = await client.get("/echo")
        assert response.status_code == 503
        assert "none leads" in response.json()["error"]["message"]
        assert float(response.headers["retry-after"]) > 0
        await service.begin()
        assert (await client.get("/echo")).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_standby_lives_without_a_leader_and_says_at_once_that_nothing_is_served(method: str) -> None:
    service = Service(Leader())
    async with standby(service, wait_s=3600) as client:
        live = await client.request(method, "/live")
        assert live.status_code == 200
        assert method == "HEAD" or live.json()["status"] == "live"
        assert (await client.request(method, "/metrics")).status_code == 200
        assert (await client.request(method, "/live", headers={"host": "evil.example"})).status_code == 403
        for path in ("/health", "/ready"):
            assert (await client.request(method, path)).status_code == 503
        await service.begin()
        if method == "GET":
            served = await client.get("/health")
            assert (served.status_code, served.json()["method"]) == (200, "GET"), "the leader tells whether it serves"


async def test_a_standby_that_was_removed_says_so_and_blames_no_client(tmp_path: Path) -> None:
    lead = Lead.make(tmp_path / "mac-1")
    lead.admit_coordinator()
    lead.admit(Role.COORDINATOR, "mac-2", f"{2:016x}", tmp_path / "mac-2")
    service = Service(Leader(), trust=lead.trust(Role.COORDINATOR))
    await service.begin()
    async with standby(service, wait_s=3600, trust=lead.trust(Role.COORDINATOR, "", tmp_path / "mac-2")) as client:
        assert (await client.get("/echo")).status_code == 200
        lead.members.remove("mac-2")
        refused = await client.get("/echo", headers={"authorization": "Bearer mpk_1"})
        assert refused.status_code == 503
        assert "this coordinator was removed" in refused.json()["error"]["message"]
