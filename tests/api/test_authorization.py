"""Authorization of every route: API keys, their limits, and pages of other sites, with the real table of routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster.api import request_service
from cluster.api.http.app import application, table
from cluster.api.http.authorization import TRUSTED, Access, Authorizer, DeclaredRoute
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.errors import HANDLERS
from cluster.api.http.json_response import Json
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.origin_policy import OriginPolicy, check_host, check_origin
from cluster.api.key_usage import KeyUsage, TokenBucket, client_of
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.cluster_state import ClusterState, ServingState
from cluster.core.errors import Aborted, InvalidOption, LimitReached, MacpipeError, NotServing, Unauthenticated
from cluster.core.request import Accepted, SamplingParams, TokenEvent
from cluster.core.request import Request as Asking
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyLimits, KeyScope, KeyStore
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Answering:
    """An answer that goes on until it is aborted."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.ended = asyncio.Event()

    async def __aiter__(self) -> AsyncGenerator[Accepted | TokenEvent, None]:
        yield Accepted()
        yield TokenEvent(0, 1, "a")
        await self.ended.wait()
        raise Aborted("the request was aborted")

    def abandon(self) -> None:
        self.ended.set()


class Idle(WorkerlessCoordinator):
    """A coordinator that serves no model."""

    state = ServingState.IDLE

    def __init__(self) -> None:
        self.answers: dict[str, Answering] = {}
        self.forgotten: set[str] = set()
        self.forgot = asyncio.Event()

    def served_model(self, name: str, adapter: str = "") -> ModelInfo:
        raise NotServing("no model is loaded")

    async def accept(self, request: Asking, model_info: ModelInfo) -> Answering:
        self.answers[request.id] = Answering(request.client)
        return self.answers[request.id]

    async def snapshot(self, *, ask: bool = True) -> ClusterState:
        raise NotServing("no model is loaded")

    async def abort(self, request_id: str) -> None:
        self.answers[request_id].ended.set()

    def forget_client(self, client: str) -> None:
        assert all(answer.ended.is_set() for answer in self.answers.values() if answer.client == client)
        self.forgotten.add(client)
        self.forgot.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(ClusterFolder(tmp_path, "lab"))


@pytest.fixture
def accounts(keys: KeyStore, clock: Clock) -> KeyUsage:
    return KeyUsage(keys, clock)


def service_of(accounts: KeyUsage | None) -> RequestService:
    return RequestService(cast(Coordinator, Idle()), Metrics(), accounts)


def client_to(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8080")


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


PUBLIC = {"/", "/page/{name}", "/health", "/ready", "/live", "/api/hello", "/api/session"}
ADMIN = {"/metrics", "/api/plan", "/api/plans", "/api/load", "/api/unload"}
PAGE = {"origin": "http://localhost:8080"}
"""What browsers send with requests of the page that change something."""


async def test_every_route_says_what_it_needs_and_lets_nobody_else_in(keys: KeyStore, accounts: KeyUsage) -> None:
    """The real table of routes, each by each of its methods."""
    service = service_of(accounts)
    app = application(service)
    routes = cast(Any, app)._next._app.routes  # Starlette's own list: what is really served
    assert len(routes) > len(table(service)) >= 14
    texts = {scope: keys.create(scope.value, scope)[1] for scope in KeyScope}
    async with client_to(app) as client:
        for route in routes:
            assert isinstance(route, DeclaredRoute), f"{route} declares nobody who may use it"
            needed = {True: Access.ANYONE}.get(route.path in PUBLIC) or (
                Access.ADMIN if route.path in ADMIN else Access.INFERENCE
            )
            assert route.access is needed, route.path
            path = route.path.replace("{model:path}", "faq")
            for method in sorted(route.methods or ()):
                allowed = {
                    "": needed is Access.ANYONE,
                    "mpk_" + "0" * 12 + "_" + "a" * 43: needed is Access.ANYONE,
                    texts[KeyScope.INFERENCE]: needed is not Access.ADMIN,
                    texts[KeyScope.ADMIN]: True,
                }
                for text, entered in allowed.items():
                    reply = await client.request(method, path, headers=(bearer(text) if text else {}) | PAGE)
                    refused = 403 if text in texts.values() else 401
                    assert (reply.status_code == refused) is not entered, (method, path, text[:20], reply.status_code)
                    assert entered or (reply.status_code, "www-authenticate" in reply.headers) == (
                        refused,
                        refused == 401,
                    )


async def test_a_route_that_declares_nothing_lets_nobody_in(keys: KeyStore, accounts: KeyUsage) -> None:
    async def fine(request: Request) -> Json:
        return Json({})

    app = Starlette(routes=[Route("/open", fine)], exception_handlers=HANDLERS)
    for kept in (None, accounts):
        async with client_to(RequestMiddleware(app, lambda *_: None, Authorizer(app.routes, kept))) as client:
            reply = await client.get("/open", headers=bearer(keys.create(f"k{kept is None}", KeyScope.ADMIN)[1]))
        assert reply.status_code == 403


async def test_strangers_are_told_nothing_but_ready_or_not(keys: KeyStore, accounts: KeyUsage) -> None:
    _, text = keys.create("amy")
    async with client_to(application(service_of(accounts))) as client:
        assert (await client.get("/health")).json() == {"status": "not serving"}
        assert (await client.get("/live")).json() == {"status": "live"}
        assert "version" in (await client.get("/health", headers={"x-api-key": text})).json()
        unknown = await client.get("/nope")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.get("/nope", headers=bearer(text))).status_code == 404


async def test_without_a_cluster_nobody_needs_a_key() -> None:
    async with client_to(application(service_of(None))) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert "version" in (await client.get("/health")).json()


async def test_a_model_that_a_request_would_load_is_ready_and_needs_nothing_else() -> None:
    coordinator = Idle()
    coordinator.catalog = ModelCatalog([ModelEntry("small", LoadOrder("org/Small"))])
    on_demand = SimpleNamespace(enabled=True, would_load=lambda requested: True)
    service = RequestService(cast(Coordinator, coordinator), Metrics(), on_demand=cast(OnDemand, on_demand))
    async with client_to(application(service)) as client:
        reply = await client.get("/ready")
    assert reply.status_code == 200
    assert (reply.json()["model"], reply.json()["message"]) == (
        "small",
        "the model small is not loaded; a request loads it",
    )


@pytest.mark.parametrize(
    "headers",
    [lambda t: bearer(t), lambda t: {"authorization": f"bearer  {t}"}, lambda t: {"x-api-key": t},
     lambda t: {"authorization": "Bearer sk-other", "x-api-key": t}],
)  # fmt: skip
async def test_keys_come_as_clients_send_them(
    keys: KeyStore, accounts: KeyUsage, headers: Callable[[str], dict[str, str]]
) -> None:
    _, text = keys.create("amy")
    async with client_to(application(service_of(accounts))) as client:
        assert (await client.get("/v1/models", headers=headers(text))).status_code == 200
        wrong = await client.get("/v1/models", headers=headers(text[:-1]))
        refused = await client.post("/v1/messages", headers=headers(text[:-1]), json={})
    assert wrong.status_code == refused.status_code == 401
    assert wrong.json()["error"]["type"] == refused.json()["error"]["type"] == "authentication_error"
    assert text[20:] not in wrong.text


async def test_a_key_is_whose_turns_and_prefixes_they_are(keys: KeyStore, accounts: KeyUsage) -> None:
    seen: list[str] = []

    async def who(request: Request) -> Json:
        seen.append(caller_of(request, None).client)
        return Json({"trusted": request.scope[TRUSTED]})

    routes = [DeclaredRoute("/who", who, access=Access.INFERENCE, methods=["GET"])]
    app = Starlette(routes=list(routes))
    (amy, a), (bob, b) = keys.create("amy"), keys.create("bob")
    async with client_to(RequestMiddleware(app, lambda *_: None, Authorizer(app.routes, accounts))) as client:
        for text in (a, b):
            await client.get("/who", headers=bearer(text))
        await client.get("/who", headers={"x-api-key": a, "authorization": "Bearer other"})
    assert seen == [client_of(amy), client_of(bob), client_of(amy)]


def test_a_bucket_is_refilled_evenly_and_never_more_than_full() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.level(30.0) == pytest.approx(30)
    assert bucket.level(1e6) == 60
    bucket.take(100, 1e6)
    assert bucket.wait_s(1, 1e6) == pytest.approx(41)
    assert bucket.wait_s(10**9, 1e6) == pytest.approx(100), "what is more than it holds waits until it is full"


async def test_requests_a_minute(keys: KeyStore, accounts: KeyUsage, clock: Clock) -> None:
    _, text = keys.create("amy", limits=KeyLimits(requests_a_minute=2))
    _, other = keys.create("bob")
    async with client_to(application(service_of(accounts))) as client:
        replies = [await client.get("/v1/models", headers=bearer(text)) for _ in range(3)]
        assert [r.status_code for r in replies] == [200, 200, 429]
        assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0", "0"]
        last = replies[-1]
        assert last.headers["retry-after"] == "30"
        error = last.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "2 requests a minute" in error["message"]
        assert "amy" in error["message"]
        assert (await client.get("/v1/models", headers=bearer(other))).status_code == 200
        assert (await client.get("/health", headers=bearer(text))).status_code == 503, "probes are not counted"
        clock.now += 30
        assert (await client.get("/v1/models", headers=bearer(text))).status_code == 200


def test_requests_at_once(keys: KeyStore, accounts: KeyUsage) -> None:
    key, _ = keys.create("amy", limits=KeyLimits(at_once=2))
    with accounts.count_request(key), accounts.count_request(key):
        with (
            pytest.raises(LimitReached, match="2 requests in progress; its limit is 2") as caught,
            accounts.count_request(key),
        ):
            pass
        assert caught.value.retry_after_s
    with accounts.count_request(key):
        pass


def test_tokens_of_prompts_and_answers(keys: KeyStore, accounts: KeyUsage, clock: Clock) -> None:
    key, _ = keys.create("amy", limits=KeyLimits(tokens_a_minute=600))
    client = client_of(key)
    with accounts.count_request(key):
        accounts.charge_prompt(client, 500)
        accounts.charge_tokens(client, 200)
    assert accounts.rate_limit_headers(key)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(LimitReached, match="600 tokens a minute; 0 are left and the prompt has 50") as caught:
        accounts.charge_prompt(client, 50)
    assert caught.value.retry_after_s == pytest.approx(15)
    clock.now += 16
    accounts.charge_prompt(client, 50)
    clock.now += 60
    accounts.charge_prompt(client, 10_000)
    with pytest.raises(LimitReached):
        accounts.charge_prompt(client, 1)
    accounts.charge_prompt("somebody without a key", 10**9)


@pytest.fixture
def asking() -> Callable[[str, str], Asking]:
    return lambda name, client: Asking(name, (1, 2), SamplingParams(), 5, client=client)


async def test_what_a_revoked_key_has_under_way_ends_with_the_reason(
    keys: KeyStore, accounts: KeyUsage, asking: Callable[[str, str], Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_service, "KEY_CHECK_S", 0.01)
    service = service_of(accounts)
    (amy, _), (bob, _) = keys.create("amy"), keys.create("bob")
    model_info = cast(ModelInfo, None)
    first, second = [await service.submit(asking(k.name, client_of(k)), model_info) for k in (amy, bob)]
    for asked in (first, second):
        assert isinstance(await anext(asked.events), TokenEvent)
    watching = asyncio.create_task(service.end_revoked())
    keys.revoke("amy")
    with pytest.raises(Unauthenticated, match="was revoked") as caught:
        await asyncio.wait_for(anext(first.events), 5)
    assert caught.value.http_status == 401
    with pytest.raises(Unauthenticated):
        await service.submit(asking("late", client_of(amy)), model_info)
    coordinator: Any = service.coordinator
    await asyncio.wait_for(coordinator.forgot.wait(), 5)
    assert coordinator.forgotten == {client_of(amy)}
    assert not coordinator.answers["bob"].ended.is_set()
    await second.events.aclose()
    watching.cancel()
    keys.create("spoil")
    with pytest.raises(MacpipeError):
        accounts.identify(())


ORIGIN = "https://chat.example:8443"


@pytest.fixture
def sited(accounts: KeyUsage) -> ASGIApp:
    return application(service_of(accounts), OriginPolicy(frozenset({"mac-1.local"}), frozenset({ORIGIN})))


async def test_a_page_that_was_let_in_by_name_may_ask_with_a_key(keys: KeyStore, sited: ASGIApp) -> None:
    _, text = keys.create("page", limits=KeyLimits(requests_a_minute=9))
    asked = {"origin": ORIGIN, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
    async with client_to(sited) as client:
        before = await client.options("/v1/chat/completions", headers=asked)
        assert before.status_code == 200, "a browser sends no key with this"
        assert before.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in before.headers["access-control-allow-methods"]
        assert before.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
        assert before.headers["x-request-id"]
        assert "access-control-allow-credentials" not in before.headers
        for headers, status in ((bearer(text), 200), ({}, 401)):
            reply = await client.get("/v1/models", headers={"origin": ORIGIN, **headers})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, ORIGIN)
            assert reply.headers["vary"] == "Origin"
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
        other = {**asked, "origin": "https://other.example"}
        refused = await client.options("/v1/chat/completions", headers=other)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
        silly = await client.options("/v1/models", headers={**asked, "access-control-request-method": "GET it"})
        assert silly.status_code == 400
        rebound = await client.options("/v1/models", headers={**asked, "host": "evil.example"})
        assert rebound.status_code == 403
        plain = await client.get("/v1/models", headers=bearer(text))
        assert "access-control-allow-origin" not in plain.headers


async def test_without_an_origin_that_is_allowed_there_is_no_cors_header(accounts: KeyUsage, keys: KeyStore) -> None:
    _, text = keys.create("plain")
    own = {"origin": "http://localhost:8080", "access-control-request-method": "GET"}
    async with client_to(application(service_of(accounts))) as client:
        for reply in (
            await client.get("/v1/models", headers={"origin": own["origin"], **bearer(text)}),
            await client.options("/v1/models", headers={**own, **bearer(text)}),
            await client.options("/v1/models", headers={**own, "origin": ORIGIN}),
        ):
            assert not [name for name in reply.headers if name == "vary" or name.startswith("access-control-")]


async def test_names_that_were_given_are_taken(keys: KeyStore, sited: ASGIApp) -> None:
    async with client_to(sited) as client:
        for host, status in (("mac-1.local:8080", 200), ("MAC-1.local.", 200), ("mac-2.local", 403), ("[::1]", 200)):
            assert (await client.get("/live", headers={"host": host})).status_code == status, host


@pytest.mark.parametrize(
    "wrong", ["", "*", "http://", "chat.example", "https://chat.example/", "ftp://x", "null", "https://["]
)
def test_an_origin_is_named_whole(wrong: str) -> None:
    with pytest.raises(InvalidOption, match="http-allow-origin"):
        check_origin(wrong)


@pytest.mark.parametrize("wrong", ["", "*:80", "mac:80", "http://mac", "a/b"])
def test_a_host_is_a_name(wrong: str) -> None:
    with pytest.raises(InvalidOption, match="http-allow-host"):
        check_host(wrong)
    assert check_host("Mac-1.Example") == "mac-1.example"
