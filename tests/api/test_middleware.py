"""The middleware and the error handlers, around an application of a few lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import Message

from cluster.api.http import body as bodies
from cluster.api.http import sse
from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.errors import HANDLERS
from cluster.api.http.json_response import Json
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.server import listen
from cluster.core.errors import (
    Aborted,
    Busy,
    DeadlineExceeded,
    InvalidOption,
    MacpipeError,
    NoPlan,
    NotServing,
    PortInUse,
    PromptTooLong,
    WorkerLost,
)
from cluster.transport.byte_budget import ByteBudget

pytestmark = pytest.mark.anyio
Endpoint = Callable[[Request], object]


def client_of(endpoint: Endpoint, seen: list[tuple[str, str, int]] | None = None) -> httpx.AsyncClient:
    told = [] if seen is None else seen
    paths = ("/v1/chat/completions", "/v1/messages")
    routes = [DeclaredRoute(path, endpoint, access=Access.INFERENCE, methods=["GET", "POST"]) for path in paths]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    guard = RequestMiddleware(
        app, lambda method, path, status, _: told.append((method, path, status)), Authorizer(routes)
    )
    transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8080")


async def fine(request: Request) -> Json:
    return Json({"ok": True})


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"host": "127.0.0.1"}, 200), ({"host": "[::1]:99"}, 200), ({"host": "evil.example"}, 403),
     ({"host": "127.0.0.1.evil.example"}, 403), ({"host": ""}, 403), ({"host": "[::1"}, 403),
     ({"origin": "http://localhost:8080"}, 200), ({"origin": "http://localhost:3000"}, 403), ({"origin": "null"}, 403),
     ({"origin": "https://evil.example"}, 403)],
)  # fmt: skip
async def test_only_this_machine_and_its_own_pages_may_ask(headers: dict[str, str], status: int) -> None:
    async with client_of(fine) as client:
        reply = await client.get("/v1/chat/completions", headers=headers)
    assert reply.status_code == status
    assert "access-control-allow-origin" not in reply.headers
    assert reply.headers["x-request-id"]


async def test_an_id_of_the_clients_comes_back() -> None:
    async with client_of(fine) as client:
        kept = await client.get("/v1/messages", headers={"x-request-id": "mine-1"})
        made = await client.get("/v1/messages", headers={"x-request-id": "a b\t"})
    assert kept.headers["x-request-id"] == "mine-1"
    assert made.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(Busy("full", retry_after_s=1.2), 429, "busy"), (WorkerLost("mac-2 is gone"), 503, "worker_lost"),
     (DeadlineExceeded("late"), 408, "deadline_exceeded"),
     (PromptTooLong("long", field="messages"), 400, "context_length_exceeded")],
)  # fmt: skip
async def test_both_shapes(error: MacpipeError, status: int, code: str) -> None:
    async def fail(request: Request) -> Json:
        raise error

    async with client_of(fail) as client:
        openai, anthropic = await client.get("/v1/chat/completions"), await client.get("/v1/messages")
    assert openai.status_code == anthropic.status_code == status
    told = openai.json()["error"]
    assert (told["message"], told["code"], told["param"]) == (error.sentence, code, error.field or None)
    assert anthropic.json()["type"] == "error"
    assert error.sentence in anthropic.json()["error"]["message"]
    if status == 408:
        assert anthropic.json()["error"]["type"] == "timeout_error"


@pytest.mark.parametrize(
    ("error", "after"),
    [(Busy("full", retry_after_s=1.2), "2"), (Busy("full"), "5"), (WorkerLost("mac-2 is gone"), "5"),
     (NotServing("no model is loaded"), "5"), (NotServing("a model is being loaded", retry_after_s=7), "7"),
     (NoPlan("the Macs that are left cannot hold it"), "5"), (PromptTooLong("long"), None)],
)  # fmt: skip
async def test_what_cannot_be_had_now_says_when_to_come_back(error: MacpipeError, after: str | None) -> None:
    async def fail(request: Request) -> Json:
        raise error

    async with client_of(fail) as client:
        for path in ("/v1/chat/completions", "/v1/messages"):
            assert (await client.get(path)).headers.get("retry-after") == after


async def test_a_fault_of_ours_gives_an_id_and_no_detail() -> None:
    async def fail(request: Request) -> Json:
        raise RuntimeError("the secret prompt")

    seen: list[tuple[str, str, int]] = []
    async with client_of(fail, seen) as client:
        reply = await client.get("/v1/chat/completions")
    assert reply.status_code == 500
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
    assert "secret" not in reply.text
    assert seen == [("GET", "/v1/chat/completions", 500)]


async def test_what_the_router_refuses_has_a_body_too() -> None:
    async with client_of(fine) as client:
        unknown, method = await client.get("/nope"), await client.delete("/v1/messages")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert (method.status_code, method.json()["error"]["type"]) == (405, "invalid_request_error")
    assert "POST" in method.headers["allow"]


async def test_a_body_is_bounded_whether_it_says_its_length_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatForm, "most_bytes", 10)

    async def take(request: Request) -> Json:
        await bodies.read(request, ChatForm)
        return Json({})

    async def parts() -> AsyncGenerator[bytes, None]:
        for _ in range(20):
            yield b" "

    async with client_of(take) as client:
        said = await client.post("/v1/chat/completions", content=b" " * 11)
        unsaid = await client.post("/v1/chat/completions", content=parts())
    assert said.status_code == unsaid.status_code == 413
    assert said.json()["error"]["code"] == "too_large"


async def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)

    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    request = Request(
        {"type": "http", "method": "POST", "headers": [], "path": "/", bodies.CHARGE: ByteBudget().open("")}, never
    )
    with pytest.raises(MacpipeError) as caught:
        await bodies.read(request, ChatForm)
    assert caught.value.http_status == 408


class Wire:
    """The server's side of one connection."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message.get("body", b""))


class AsSent:
    """An encoder of pieces that are encoded already."""

    def begin(self) -> tuple[bytes, ...]:
        return ()

    def encode(self, e: bytes) -> tuple[bytes, ...]:
        return (e,)

    def end(self) -> tuple[bytes, ...]:
        return (b"end",)

    def idle(self) -> bytes:
        return sse.COMMENT

    def fail(self, error: MacpipeError) -> bytes:
        return error.sentence.encode()


def stream_of(pieces: AsyncGenerator[bytes, None]) -> sse.EventStream[bytes]:
    return sse.EventStream(aclosing(pieces), AsSent(), "req-1")


async def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STREAM_COMMENT_S", 0.02)

    async def slow() -> AsyncGenerator[bytes, None]:
        yield b"first"
        while len(wire.sent) < 5:
            await asyncio.sleep(0.01)
        yield b"last"

    wire = Wire()
    await stream_of(slow())({"type": "http"}, wire.receive, wire.send)
    assert wire.sent[1] == b"first"
    assert wire.sent[-3:] == [b"last", b"end", b""]
    assert set(wire.sent[2:-3]) == {sse.COMMENT}


async def test_an_error_is_the_last_event() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"first"
        raise Aborted("it was aborted")

    wire = Wire()
    await stream_of(failing())({"type": "http"}, wire.receive, wire.send)
    assert wire.sent[1:] == [b"first", b"it was aborted", b""]


async def test_a_client_that_leaves_closes_the_events() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    wire = Wire()
    stream = asyncio.create_task(stream_of(endless())({"type": "http"}, wire.receive, wire.send))
    while len(wire.sent) < 3:
        await asyncio.sleep(0.01)
    wire.gone.set()
    await asyncio.wait_for(stream, 5)
    assert closed.is_set()


async def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STREAM_WRITE_TIMEOUT_S", 0.05)
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"x"
        finally:
            closed.set()

    async def stuck(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    wire = Wire()
    await asyncio.wait_for(stream_of(events())({"type": "http"}, wire.receive, stuck), 5)
    assert closed.is_set()


async def test_http_stays_on_this_machine() -> None:
    with pytest.raises(InvalidOption, match="open to everybody"):
        listen("0.0.0.0", 8080)  # noqa: S104
    with listen("127.0.0.1", 0) as taken, pytest.raises(PortInUse, match="--http"):
        listen("127.0.0.1", taken.getsockname()[1])
