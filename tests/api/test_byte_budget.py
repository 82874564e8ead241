"""The byte budget of requests: one for all clients and one for each, released however a request ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request

from cluster.api.http import body as bodies
from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.errors import HANDLERS
from cluster.api.http.json_response import Json
from cluster.api.http.middleware import RequestMiddleware
from cluster.core.errors import Busy
from cluster.core.limits import FREE_BODY_BYTES
from cluster.transport.byte_budget import ByteBudget, Charge

ROUTE = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "x" * FREE_BODY_BYTES}]}).encode()


def test_a_client_gets_half_and_a_newcomer_finds_room() -> None:
    budget = ByteBudget(100)
    budget.take("a", 50)
    with pytest.raises(Busy) as caught:
        budget.take("a", 1)
    assert caught.value.retry_after_s
    budget.take("b", 25)
    with pytest.raises(Busy):
        budget.take("b", 1)
    budget.take("c", 12)
    budget.give_back("a", 50)
    budget.take("b", 6)
    assert budget.held == 43


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, FREE_BODY_BYTES), max_size=4)), max_size=20))
def test_no_more_is_held_than_there_is_and_nothing_stays(requests: list[tuple[str, list[int]]]) -> None:
    budget, charges = ByteBudget(4 * FREE_BODY_BYTES), list[Charge]()
    for client, parts in requests:
        charge = budget.open(client)
        charges.append(charge)
        for part in parts:
            try:
                charge.add(part)
            except Busy:
                break
        assert 0 <= budget.held <= 4 * FREE_BODY_BYTES
    for charge in charges:
        charge.__exit__()
    assert budget.held == 0


@pytest.fixture
def budget() -> ByteBudget:
    return ByteBudget(4 * FREE_BODY_BYTES)


def client_of(budget: ByteBudget, held: list[int], fault: BaseException | None = None) -> httpx.AsyncClient:
    async def take(request: Request) -> Json:
        await bodies.read(request, ChatForm)
        held.append(budget.held)
        if fault:
            raise fault
        return Json({})

    routes = [DeclaredRoute(ROUTE, take, access=Access.INFERENCE, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    guard = RequestMiddleware(app, lambda *_: None, Authorizer(routes), None, budget)
    transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [None, ValueError("a fault"), ClientDisconnect(), Busy("full")])
async def test_bytes_are_held_until_the_request_ends_and_then_given_back(
    budget: ByteBudget, fault: BaseException | None
) -> None:
    held: list[int] = []
    async with client_of(budget, held, fault) as client:
        for _ in range(10):
            await client.post(ROUTE, content=BODY)
    assert held == [len(BODY) - FREE_BODY_BYTES] * 10
    assert budget.held == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content", [b"{" + b" " * FREE_BODY_BYTES, b" " * 2 * FREE_BODY_BYTES, b"[" * 2 * FREE_BODY_BYTES]
)
async def test_a_refused_body_gives_its_bytes_back(budget: ByteBudget, content: bytes) -> None:
    async with client_of(budget, []) as client:
        assert (await client.post(ROUTE, content=content)).status_code in (400, 413)
    assert budget.held == 0


@pytest.mark.anyio
async def test_over_the_budget_it_is_429_and_small_requests_pass(budget: ByteBudget) -> None:
    held: list[int] = []
    refill = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        yield BODY[:-1] + b" " * FREE_BODY_BYTES
        await refill.wait()
        yield BODY[-1:]

    async with client_of(budget, held) as client:
        waiting = [asyncio.create_task(client.post(ROUTE, content=slow())) for _ in range(4)]
        first: Any = await next(asyncio.as_completed(waiting))
        assert first.status_code == 429
        assert first.headers["retry-after"]
        assert first.json()["error"]["code"] == "too_many_bytes"
        assert (await client.post(ROUTE, content=BODY.replace(b"x", b""))).status_code == 200
        refill.set()
        codes = sorted([(await one).status_code for one in waiting])
    assert codes == [200, 429, 429, 429]
    assert budget.held == 0
