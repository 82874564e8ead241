"""The page's routes without a browser: files and their policy, sessions, origins, and the feed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.types import ASGIApp, Message

from cluster.api.background_load import BackgroundLoad, LoadTracker
from cluster.api.cluster_feed import ClusterFeed
from cluster.api.http.app import application
from cluster.api.http.browser_sessions import BrowserSessions
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.page_files import FOLDER
from cluster.api.key_usage import KeyUsage
from cluster.api.metrics import Metrics
from cluster.api.page_limits import FEED_REQUESTS, MAX_SESSIONS, MAX_VIEWERS, SESSION_S, SESSIONS_OF_KEY
from cluster.api.request_service import RequestService
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.planner import make_plan
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.cluster_state import ClusterState, LiveRequest, RequestState, ServingState
from cluster.core.errors import Busy, NoPlan, NotServing, Unauthenticated
from cluster.core.joint_plan import JointPlan, UnplacedModel
from cluster.core.limits import MIB
from cluster.core.plan import LoadProgress, ModelRef, ModelShape
from cluster.core.worker import WorkerInfo
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyLimits, KeyScope, KeyStore
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio
ORIGIN = "http://localhost:8080"
PAGE = {"origin": ORIGIN, "sec-fetch-site": "same-origin"}
"""What browsers send with the page's own requests."""
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


SHAPE = ModelShape(ModelRef("m", "", "f"), 6, (10 * MIB,) * 6, (MIB,) * 6, (), (1, 2, 3, 4, 5), (), 64)
WORKERS = tuple(
    WorkerInfo(f"id-{name}", name, "1", f"{name}:1", f"{name}:2", "", "cpu", "", 0, 80 * MIB, cluster="c")
    for name in ("ada", "bob")
)


class Silent:
    """A reporter that shows nothing."""

    def waiting(self, found: object, wanted: object) -> None: ...

    def planned(self, plan: object) -> None: ...

    def progress(self, progress: object) -> None: ...


class Watched(WorkerlessCoordinator):
    """A coordinator without a model, whose state can be watched. ``loads`` and ``plans`` are the orders given to it."""

    def __init__(self) -> None:
        self.state = ServingState.IDLE
        self.requests: tuple[LiveRequest, ...] = ()
        self.snapshots = 0
        self.loads: list[LoadOrder] = []
        self.plans: list[LoadOrder] = []
        self.loaded = asyncio.Event()
        self.joint_plans: list[ModelEntry] = []
        self.joint_planner = self

    def served_model(self, name: str, adapter: str = "") -> Any:
        raise NotServing("no model is loaded")

    async def snapshot(self, *, ask: bool = True) -> ClusterState:
        assert not ask, "watching asks no worker"
        self.snapshots += 1
        return ClusterState("lab", "1", self.state, requests=self.requests)

    async def load(self, order: LoadOrder, *, name: str) -> None:
        self.loads.append(order)
        await self.loaded.wait()
        raise NoPlan("the model does not fit")

    async def plan(self, order: LoadOrder) -> Any:
        self.plans.append(order)
        raise NotServing("no worker was measured")

    async def plan_models(self, entries: list[ModelEntry]) -> JointPlan:
        self.joint_plans = entries
        return JointPlan((), (UnplacedModel("b", "c", ("a",)),), (), ())

    async def unload(self, name: str) -> None:
        raise NotServing("a model is being loaded")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(ClusterFolder(tmp_path, "lab"))


@pytest.fixture
def usage(keys: KeyStore, clock: Clock) -> KeyUsage:
    return KeyUsage(keys, clock)


def app_of(usage: KeyUsage | None, coordinator: Watched | None = None) -> ASGIApp:
    return application(RequestService(cast(Coordinator, coordinator or Watched()), Metrics(), usage))


def client_to(app: ASGIApp, base_url: str = ORIGIN) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=base_url)


async def sign_in(client: httpx.AsyncClient, text: str) -> httpx.Response:
    return await client.post("/api/session", json={"key": text}, headers=PAGE | {"origin": str(client.base_url)})


async def test_a_browser_gets_the_page_and_a_program_a_text(usage: KeyUsage) -> None:
    async with client_to(app_of(usage)) as client:
        page = await client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
        text = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert f"curl {ORIGIN}/v1/" in page.text, "a browser without JavaScript is told what else there is"
        assert text.text.startswith("macpipe.\n"), "strangers are not told the version"
        again = await client.get("/", headers={"accept": "text/html", "if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        hostile = await client.get("/", headers={"accept": "text/html", "host": 'localhost:"><script>'})
        assert "<script>/v1" not in hostile.text
    async with client_to(app_of(usage), "https://localhost:8923") as client:
        page = await client.get("/", headers={"accept": "text/html"})
        assert "curl https://localhost:8923/v1/" in page.text


async def test_the_files_of_the_page_forbid_all_that_it_does_not_need(usage: KeyUsage) -> None:
    async with client_to(app_of(usage)) as client:
        for name in sorted(path.name for path in FOLDER.iterdir() if path.suffix != ".txt"):
            reply = await client.get(f"/page/{name}")
            assert reply.status_code == 200, name
            policy = dict(one.split(" ", 1) for one in reply.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'none'"
            assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
            assert policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
            assert reply.headers["x-content-type-options"] == "nosniff"
        for name in ("nothing.js", "..%2Fapp.py", "%2e%2e/app.py", "LICENSE.txt"):
            assert (await client.get(f"/page/{name}")).status_code in (401, 404), name


def test_a_first_visit_is_small_and_loads_nothing_from_other_hosts() -> None:
    files = [path for path in FOLDER.iterdir() if path.suffix in {".html", ".css", ".js", ".svg"}]
    assert sum(path.stat().st_size for path in files) <= 300_000
    document = (FOLDER / "index.html").read_text()
    assert "//" not in document.replace("http://localhost:8080", "").replace("<!--", "")
    assert "<style" not in document
    assert " style=" not in document


async def test_signing_in_keeps_a_session_that_scripts_and_other_sites_cannot_use(
    keys: KeyStore, usage: KeyUsage
) -> None:
    _, text = keys.create("amy")
    async with client_to(app_of(usage)) as client:
        assert (await client.get("/api/session", headers=PAGE)).json()["required"]
        reply = await sign_in(client, f" {text}\n")
        cookie = reply.headers["set-cookie"].lower()
        assert {"httponly", "samesite=strict", "path=/"} <= set(cookie.split("; "))
        assert "secure" not in cookie
        assert text not in cookie
        facts = {"required": True, "name": "amy", "scope": "inference", "problem": None}
        assert reply.json() == (await client.get("/api/session", headers=PAGE)).json() == facts
        assert (await client.post("/api/answer", json=HELLO, headers=PAGE)).status_code == 503, "no model, but let in"
        assert (await client.delete("/api/session", headers=PAGE)).json()["name"] is None
        assert (await client.post("/api/answer", json=HELLO, headers=PAGE)).status_code == 401


async def test_over_tls_the_cookie_is_secure_and_of_this_host_alone(keys: KeyStore, usage: KeyUsage) -> None:
    _, text = keys.create("amy")
    async with client_to(app_of(usage), "https://localhost:8080") as client:
        cookie = (await sign_in(client, text)).headers["set-cookie"]
        assert cookie.startswith("__Host-macpipe=")
        assert "; secure" in cookie.lower()
        assert "domain" not in cookie.lower()
        assert (await client.get("/api/session")).json()["name"] == "amy"


@pytest.mark.parametrize("wrong", ["", "nonsense", "mpk_" + "0" * 12 + "_" + "a" * 43, "é"])
async def test_a_wrong_key_is_told_so_and_gets_no_cookie(usage: KeyUsage, wrong: str) -> None:
    async with client_to(app_of(usage)) as client:
        reply = await sign_in(client, wrong)
    assert reply.status_code == 401
    assert "key" in reply.json()["error"]["message"]
    assert "set-cookie" not in reply.headers


async def test_a_sign_in_is_short(usage: KeyUsage) -> None:
    async with client_to(app_of(usage)) as client:
        long = await sign_in(client, "m" * 10_000)
    assert (long.status_code, "4 KiB" in long.text) == (413, True)


async def test_the_api_takes_no_cookie(keys: KeyStore, usage: KeyUsage) -> None:
    _, text = keys.create("amy", KeyScope.ADMIN)
    async with client_to(app_of(usage)) as client:
        await sign_in(client, text)
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert (await client.get(path, headers=PAGE)).status_code == 401, path
        for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
            assert (await client.post(path, json=HELLO, headers=PAGE)).status_code == 401, path


@pytest.mark.parametrize(
    "headers", [{}, {"origin": "http://localhost:3000"}, {"origin": "null"}, {"origin": "http://127.0.0.1:8080"}]
)
async def test_a_cookie_changes_nothing_for_another_origin(
    keys: KeyStore, usage: KeyUsage, headers: dict[str, str]
) -> None:
    """Another port of the same host is the same site to a browser: it sends the cookie, even with SameSite=Strict."""
    coordinator = Watched()
    _, text = keys.create("amy", KeyScope.ADMIN)
    async with client_to(app_of(usage, coordinator)) as client:
        await sign_in(client, text)
        for path in ("/api/load", "/api/unload", "/api/plan", "/api/plans", "/api/answer", "/api/session"):
            reply = await client.post(path, json={"model": "faq"}, headers=headers)
            assert reply.status_code == 403, path
        assert (await client.delete("/api/session", headers=headers)).status_code == 403
        read = await client.get("/api/events", headers={"sec-fetch-site": "same-site"})
        assert read.status_code == 403
    assert not coordinator.loads


async def test_an_origin_that_may_use_the_api_may_not_use_a_session(keys: KeyStore, usage: KeyUsage) -> None:
    other = "https://chat.example:8443"
    _, text = keys.create("amy", KeyScope.ADMIN)
    service = RequestService(cast(Coordinator, Watched()), Metrics(), usage)
    async with client_to(application(service, OriginPolicy(frozenset(), frozenset({other})))) as client:
        await sign_in(client, text)
        reply = await client.post("/api/load", json={"model": "faq"}, headers={"origin": other})
        assert reply.status_code == 403
        assert "access-control-allow-credentials" not in reply.headers


async def test_without_a_cluster_changes_still_need_the_page() -> None:
    coordinator = Watched()
    async with client_to(app_of(None, coordinator)) as client:
        assert (await client.get("/api/session")).json() == {
            "required": False, "name": None, "scope": "admin", "problem": None,
        }  # fmt: skip
        assert (await client.post("/api/load", json={"model": "faq"})).status_code == 403
        assert (await client.post("/api/session", json={"key": "x"}, headers=PAGE)).status_code == 400
        assert (await client.post("/api/load", json={"model": "faq"}, headers=PAGE)).status_code == 202
        assert (await client.post("/api/load", json={"model": "faq"}, headers=PAGE)).status_code == 503, "one runs"
        coordinator.loaded.set()


async def test_a_load_from_the_page_keeps_the_settings_of_serve() -> None:
    coordinator, first = Watched(), LoadOrder("m", max_context=3000, max_step_ms=40.0)
    service = RequestService(cast(Coordinator, coordinator), Metrics(), None)
    async with client_to(application(service, first=first)) as client:
        assert (await client.post("/api/load", json={"model": "faq"}, headers=PAGE)).status_code == 202
        assert (await client.post("/api/plan", json={"model": "faq"}, headers=PAGE)).status_code == 503
        while not coordinator.loads:
            await asyncio.sleep(0)
        coordinator.loaded.set()
    for order in (*coordinator.loads, *coordinator.plans):
        assert (order.model, order.max_context, order.default_context, order.max_step_ms) == ("faq", None, 3000, 40.0)
    assert len(coordinator.loads) == len(coordinator.plans) == 1


async def test_several_models_are_planned_under_their_names() -> None:
    coordinator = Watched()
    models = [{"model": "org/large", "pinned": True, "priority": 2}, {"model": "faq", "name": "small", "workers": 1}]
    async with client_to(app_of(None, coordinator)) as client:
        reply = await client.post("/api/plans", json={"models": models}, headers=PAGE)
        assert (reply.status_code, reply.json()["left_out"]) == (200, [{"name": "b", "why": "c", "unload": ["a"]}])
        for wrong in ([], [{"model": "a"}] * 17, [{"model": "a", "name": "*"}], [{"model": "a", "priority": -1}]):
            assert (await client.post("/api/plans", json={"models": wrong}, headers=PAGE)).status_code == 400, wrong
    large, small = coordinator.joint_plans
    assert (large.name, large.pin, large.priority) == ("org/large", True, 2)
    assert (small.name, small.pin, small.order.worker_count) == ("small", False, 1)


async def test_a_key_without_the_right_is_told_which_one_it_needs(keys: KeyStore, usage: KeyUsage) -> None:
    _, text = keys.create("amy")
    async with client_to(app_of(usage)) as client:
        await sign_in(client, text)
        reply = await client.post("/api/plan", json={"model": "faq"}, headers=PAGE)
    assert reply.status_code == 403
    assert "scope admin; the key amy has the scope inference" in reply.json()["error"]["message"]


async def test_a_session_ends_with_its_time_and_with_its_key(keys: KeyStore, usage: KeyUsage, clock: Clock) -> None:
    sessions = BrowserSessions(usage, clock)
    key, _ = keys.create("amy")
    old = sessions.open(key)
    clock.now += SESSION_S - 1
    assert sessions.find(old) == key
    new = sessions.open(key)
    clock.now += 1
    with pytest.raises(Unauthenticated, match="sign in again"):
        sessions.find(old)
    keys.revoke("amy")
    with pytest.raises(Unauthenticated):
        sessions.find(new)
    with pytest.raises(Unauthenticated):
        sessions.find("x" * 10_000)


def test_sessions_are_bounded_for_each_key_and_for_all(keys: KeyStore, usage: KeyUsage) -> None:
    sessions = BrowserSessions(usage, Clock())
    (amy, _), (bob, _) = keys.create("amy"), keys.create("bob")
    first, second = sessions.open(amy), sessions.open(amy)
    kept = sessions.open(bob)
    for _ in range(SESSIONS_OF_KEY - 1):
        sessions.open(amy)
    with pytest.raises(Unauthenticated):
        sessions.find(first)
    assert sessions.find(second) == amy
    assert sessions.find(kept) == bob
    for i in range(MAX_SESSIONS):
        sessions.open(replace(amy, id=f"{i:012x}"))
    with pytest.raises(Unauthenticated):
        sessions.find(kept)


async def test_yesterdays_cookie_is_told_why(keys: KeyStore, usage: KeyUsage) -> None:
    async with client_to(app_of(usage)) as client:
        client.cookies.set("macpipe", "yesterday")
        shown = (await client.get("/api/session", headers=PAGE)).json()
        refused = await client.get("/api/events", headers=PAGE)
    assert "sign in again" in shown["problem"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "session_ended")


@asynccontextmanager
async def watching(app: ASGIApp, headers: dict[str, str]) -> AsyncIterator[asyncio.Queue[Message]]:
    """Open /api/events, and yield its messages as they come."""
    sent: asyncio.Queue[Message] = asyncio.Queue()
    gone = asyncio.Event()
    scope = {
        "type": "http", "method": "GET", "path": "/api/events", "raw_path": b"/api/events", "query_string": b"",
        "scheme": "http", "http_version": "1.1", "root_path": "", "client": ("127.0.0.1", 1), "server": ("", 1),
        "headers": [(b"host", b"localhost:8080"), *((k.encode(), v.encode()) for k, v in headers.items())],
    }  # fmt: skip

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    stream = asyncio.create_task(app(scope, receive, sent.put))  # type: ignore[arg-type]
    try:
        yield sent
    finally:
        gone.set()
        await stream


async def next_event(sent: asyncio.Queue[Message]) -> tuple[str, Any]:
    while True:
        message = await asyncio.wait_for(sent.get(), 10)
        if body := message.get("body"):
            name, data = body.decode().strip().split("\n")
            return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_the_feed_tells_the_state_and_ends_with_the_key(keys: KeyStore, usage: KeyUsage) -> None:
    coordinator = Watched()
    coordinator.requests = tuple(
        LiveRequest(f"r{i}", RequestState.QUEUED, 1, 0, 0, None, 0.0) for i in range(FEED_REQUESTS + 9)
    )
    _, text = keys.create("amy", limits=KeyLimits(at_once=1))
    app = app_of(usage, coordinator)
    async with client_to(app) as client:
        await sign_in(client, text)
        cookie = {"cookie": f"macpipe={client.cookies['macpipe']}"}
        async with watching(app, PAGE | cookie) as sent:
            name, state = await next_event(sent)
            assert (name, state["cluster"], state["state"], state["models"]) == ("cluster", "lab", "idle", [])
            assert (state["requests_live"], len(state["requests"])) == (FEED_REQUESTS + 9, FEED_REQUESTS)
            chat = await client.post("/api/answer", json=HELLO, headers=PAGE)
            assert chat.status_code == 503, "a page that watches takes none of the key's requests"
            keys.revoke("amy")
            while name == "cluster":
                name, state = await next_event(sent)
            assert (name, state["error"]["code"]) == ("failure", "session_ended")


async def test_viewers_share_snapshots_and_are_bounded() -> None:
    taken = 0

    async def take() -> bytes:
        nonlocal taken
        taken += 1
        await asyncio.sleep(0)
        return str(taken).encode()

    feed = ClusterFeed(interval_s=0.01)

    async def watch() -> list[bytes]:
        seen = []
        async with aclosing(feed.snapshots(take)) as snapshots:
            async for snapshot in snapshots:
                seen.append(snapshot)
                if len(seen) == 5:
                    return seen
        raise AssertionError

    seen = await asyncio.gather(*(watch() for _ in range(20)))
    assert all(len(set(one)) == 5 for one in seen), "nobody is sent a snapshot twice"
    assert taken < 20
    joined = [feed.join() for _ in range(MAX_VIEWERS)]
    for one in joined:
        one.__enter__()
    with pytest.raises(Busy), feed.join():
        pass
    joined.pop().__exit__(None, None, None)
    with feed.join():
        pass


async def test_a_viewer_that_leaves_while_it_takes_a_snapshot_stops_nobody() -> None:
    begun = asyncio.Event()

    async def take() -> bytes:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        return b"state"

    feed = ClusterFeed()
    first, second = feed.snapshots(take), feed.snapshots(take)
    leaving = asyncio.ensure_future(anext(first))
    await begun.wait()
    waiting = asyncio.ensure_future(anext(second))
    leaving.cancel()
    assert await asyncio.wait_for(waiting, 10) == b"state"
    ending = asyncio.ensure_future(anext(second))
    feed.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(ending, 10)


async def test_a_load_goes_on_without_its_client_and_its_failure_is_kept() -> None:
    coordinator = Watched()
    loads = BackgroundLoad(cast(Coordinator, coordinator))
    assert loads.state() is None
    loads.start(LoadOrder("big"))
    with pytest.raises(NotServing, match="another model"):
        loads.start(LoadOrder("small"))
    coordinator.loaded.set()
    async with asyncio.timeout(10):
        while not (failed := loads.state()):
            await asyncio.sleep(0)
    assert failed.problem == "the model does not fit"
    coordinator.loaded.clear()
    loads.start(LoadOrder("small"))
    assert loads.state() is None, "a new load forgets why the last one failed"
    while len(coordinator.loads) < 2:
        await asyncio.sleep(0)
    await loads.close()
    coordinator.loaded.set()
    await asyncio.sleep(0)
    assert loads.state() is None, "it was ended, and did not fail"


def test_the_progress_of_any_load_is_kept() -> None:
    plan = make_plan(7, SHAPE, WORKERS, LoadOrder("m"))
    tracker = LoadTracker(cast(Reporter, Silent()))
    tracker.waiting(WORKERS[:1], 2)
    assert (tracker.state.workers_found, tracker.state.workers_wanted, tracker.state.stages) == (1, 2, ())
    tracker.planned(plan)
    assert [stage.state for stage in tracker.state.stages] == ["waiting", "waiting"]
    done = LoadProgress("bob", plan.stages[1].layers, 5, 10, "reading")
    tracker.progress(done)
    assert tracker.state.model == "m"
    assert tracker.state.stages[1] == done
    assert tracker.state.stages[0].done_bytes == 0
    shared = tuple(replace(stage, spec=replace(stage.spec, layers=plan.stages[0].layers)) for stage in plan.stages)
    tracker.planned(replace(plan, stages=shared))
    tracker.progress(LoadProgress("bob", shared[1].layers, 5, 10, "reading"))
    assert [(one.worker, one.done_bytes) for one in tracker.state.stages] == [("ada", 0), ("bob", 5)], "a group's ranks"
