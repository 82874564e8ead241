"""Clients that say nothing, or too little: their connections end, and nobody else's does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cluster.api.http import patience
from cluster.api.http.server import listen, serving

pytestmark = pytest.mark.anyio
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def slowly(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.6)
    return PlainTextResponse("here")


@asynccontextmanager
async def connected(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Streams]:
    monkeypatch.setattr(patience, "HEAD_TIMEOUT_S", 0.3)
    async with serving(Starlette(routes=[Route("/", slowly)]), listen("127.0.0.1", 0)) as address:
        port = urlsplit(f"//{address}").port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(10):
            return await reader.read(1) == b""
    except ConnectionResetError:
        return True


async def test_who_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (reader, _):
        assert await ended(reader)


async def test_a_byte_now_and_then_does_not_put_the_end_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (reader, writer):
        began = time.monotonic()
        gone = asyncio.create_task(ended(reader))
        writer.write(HEAD)
        while not gone.done() and time.monotonic() - began < 8:
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert await gone


async def test_an_answer_may_take_longer_and_so_may_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (reader, writer):
        for _ in range(2):
            writer.write(HEAD + b"\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(4) == b"here"
            await asyncio.sleep(0.5)


async def test_a_second_request_that_stalls_is_let_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\nhere")
        writer.write(HEAD)
        assert await ended(reader)
