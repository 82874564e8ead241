"""The page in a real browser: Debian's Chromium, driven by Playwright. Its routes are tested in ``tests/api``."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.api.http.page_files import FOLDER
from cluster.api.http.sse import event
from cluster.api.page_limits import FEED_REQUESTS
from cluster.core.cluster_state import (
    ClusterEvent,
    ClusterState,
    DeploymentState,
    EventKind,
    LiveRequest,
    Repair,
    ReplicaState,
    RequestState,
    ServingState,
    StageState,
)
from cluster.core.json_types import to_json_types
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeadershipState, Replicate, StandbyState
from cluster.core.plan import LayerRange, Route
from cluster.core.request import SamplingParams, StageFigures
from cluster.core.worker import WorkerState
from cluster.security.keys import KeyScope, KeyStore
from compat.conftest import Served
from integration.daemons import Cluster, free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
AXE = os.environ.get("MACPIPE_AXE", "")
"""Path of axe.min.js from the npm package axe-core."""
WAIT_MS = 60_000
SEEN_S = 3.0
"""A killed worker is seen on the page within this time: half of it is for machines that do other work, too."""
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.xdist_group("compat"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT_MS)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open an address in a browser of its own, which has no cookie yet; what it asked for and said is kept."""
    opened = []

    def open_page(address: str, key: str = "none", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        opened.append(context)
        page = context.new_page()
        page.asked, page.problems = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        if key != "none":
            sign_in(page, key)
        return page

    yield open_page
    for context in opened:
        context.close()


@pytest.fixture
def show(visit: Callable[..., Any]) -> Callable[..., Any]:
    """Open the page without a cluster: it is fed ``state``, and ``page.told`` are the bodies that it sends."""

    def open_page(state: ClusterState, view: str, plan: Any = None) -> Any:
        facts = to_json_types(state) | {"requests_live": len(state.requests), "models": [], "loading": None}
        for replica in (replica for one in facts["deployments"] for replica in one["replicas"]):
            replica["requests_live"] = len(replica["requests"])
        answers = {
            "/": (FOLDER / "index.html").read_text(),
            "/api/session": json.dumps({"required": False, "name": None, "scope": "admin", "problem": None}),
            "/api/events": event(facts, "cluster").decode(),
            "/api/plan": json.dumps(plan),
            "/api/load": json.dumps({"state": "loading"}),
            "/api/unload": json.dumps({"state": "idle"}),
            "/api/answer": 'data: {"choices": [{"delta": {"content": "A link."}}]}\n\ndata: [DONE]\n\n',
        }
        kinds = {"/": "text/html", "/api/events": "text/event-stream"}
        told: list[Any] = []

        def answer(route: Any) -> None:
            path = httpx.URL(route.request.url).path
            if path.startswith("/page/"):
                route.fulfill(path=FOLDER / path.removeprefix("/page/"))
                return
            told.extend([route.request.post_data_json] if route.request.method == "POST" else [])
            status = 400 if path == "/api/plan" and "error" in plan else 200
            route.fulfill(status=status, body=answers[path], content_type=kinds.get(path, "application/json"))

        page = visit("about:blank", viewport=DESKTOP)
        page.told = told
        page.route("**/*", answer)
        page.goto(f"http://page.test/#{view}")
        return page

    return open_page


def sign_in(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.keyboard.press("Enter")


def ask(page: Any, text: str) -> str:
    """Send a message in the chat and wait for the end of the answer; its text."""
    page.fill("#chat textarea", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat .answer:last-child:not([aria-busy])")
    return str(page.inner_text("#chat .answer:last-child .text"))


def test_the_page_shows_the_macs_and_chats_on_a_phone_without_another_host(
    faq: Served, visit: Callable[..., Any]
) -> None:
    page = visit(faq.http, faq.key, viewport=PHONE)
    for name in ("eve", "fay"):
        page.wait_for_selector(f".mac h3:has-text('{name}')")
    page.click("nav a[href='#chat']")
    assert ask(page, "What is a hop?")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert {httpx.URL(url).netloc for url in page.asked} == {httpx.URL(faq.http).netloc}
    assert not page.problems


def test_the_chat_samples_as_the_command_line_does(show: Callable[..., Any]) -> None:
    page = show(ClusterState("lab", "1", ServingState.SERVING), "chat")
    assert ask(page, "What is a hop?") == "A link."
    assert [body["temperature"] for body in page.told] == [SamplingParams().temperature] == [0]


def test_the_chat_says_why_it_waits_in_sentences(show: Callable[..., Any]) -> None:
    repair = Repair("fay", "the worker fay does not answer", 2.0, "planning", 6.0, 1)
    page = show(ClusterState("lab", "1", ServingState.RECOVERING, repair=repair), "chat")
    assert page.inner_text("#chat .foot [role=status]").endswith("it is back. The worker fay does not answer.")


def test_without_a_model_no_stage_is_idle(show: Callable[..., Any]) -> None:
    page = show(ClusterState("lab", "1", ServingState.IDLE), "cluster")
    assert page.inner_text("[data-key=Idle] .big") == "\N{EN DASH}"


def stage(index: int, worker: str, idle: float | None = None) -> StageState:
    return StageState(index, worker, LayerRange(index, index + 1), 1, 1, Route.DIRECT, bubble_share=idle)


def worker(name: str) -> WorkerState:
    return WorkerState(name, name, "1", "", "", "", "cpu", "", 1, 1, reachable=True)


def models() -> ClusterState:
    """Three models: one over two Macs, two copies of another one, and one that is not loaded."""
    live = LiveRequest("r", RequestState.DECODE, 9, 9, 1, 0, 1.0)
    big = ReplicaState(ServingState.SERVING, "", 1, (stage(0, "fay", 0.5), stage(1, "gus", 0.25)), (), (0,), 0, 0)
    copies = [
        ReplicaState(ServingState.SERVING, "", 2, (stage(0, name, 0.75),), requests, (len(requests),), 1, 0)
        for name, requests in (("gus", ()), ("eve", (live, live)))
    ]
    return ClusterState(
        "lab", "1", ServingState.SERVING, model="big", layers=2, max_context=64, max_sequences=4, stages=big.stages,
        workers=tuple(map(worker, ("eve", "fay", "gus"))),
        deployments=(
            DeploymentState("big", "/big", ServingState.SERVING, max_context=64, pinned=True, replicas=(big,)),
            DeploymentState("small", "/small", ServingState.SERVING, max_context=32, replicas=tuple(copies)),
            DeploymentState("other", "/other", ServingState.IDLE),
        ),
    )  # fmt: skip


def test_a_group_is_one_stage_with_a_box_for_each_rank(show: Callable[..., Any]) -> None:
    pair = [replace(stage(0, name, 0.5), rank=rank, ranks=2) for rank, name in enumerate(("fay", "gus"))]
    workers = tuple(map(worker, ("eve", "fay", "gus")))
    state = ClusterState("lab", "1", ServingState.SERVING, model="m", layers=2, workers=workers)
    page = show(replace(state, stages=(*pair, stage(1, "eve", 0.0))), "cluster")
    assert page.inner_text(".title .soft").startswith("2 layers · 2 stages")
    assert (page.locator(".hop").count(), page.locator(".beside").count()) == (1, 1)
    boxes = page.locator(".mac .facts").all_inner_texts()
    assert [one.split("\n")[1] for one in boxes] == ["0 (rank 0 of 2)", "0 (rank 1 of 2)", "1"]
    assert page.inner_text("[data-key=Idle] .big") == "25 %", "of two stages"


@pytest.mark.long
def test_any_of_several_models_is_shown_loaded_and_unloaded_by_name(show: Callable[..., Any]) -> None:
    page = show(models(), "cluster")
    assert page.locator(".mac h3").all_inner_texts() == ["fay", "gus"]
    assert page.inner_text("h1") == "big"
    page.click("button[aria-label='Show small']")
    page.wait_for_selector("h1:has-text('small')")
    assert page.locator(".mac h3").all_inner_texts() == ["gus", "eve"]
    assert page.inner_text("#pipeline-title") == "Pipelines"
    assert page.inner_text("[data-key=Requests] .big") == "2"
    assert page.inner_text("[data-key=Idle] .big") == "75 %"
    assert page.get_attribute("button[aria-label='Show small']", "aria-pressed") == "true"
    assert page.locator("button[aria-label='Show other']").count() == 0
    for verb, name in (("Unload", "small"), ("Load", "other")):
        page.click(f"button[aria-label='{verb} {name}']")
        with page.expect_response(f"**/api/{verb.lower()}"):
            page.click("dialog button.main")
    assert page.told == [{"name": "small"}, {"model": "other"}]
    page.goto("http://page.test/#plan")
    assert page.locator("text=Unload the model").is_hidden()
    assert not page.problems


def test_an_idle_share_tells_its_time_and_a_lost_mac_keeps_its_colour(show: Callable[..., Any]) -> None:
    way = tuple(StageFigures(name, LayerRange(0, 1), 1.0, 0.0, 0.0) for name in ("fay", "gus", "eve"))
    request = LiveRequest("r", RequestState.DECODE, 9, 9, 1, 0, 1.0, stages=way)
    lost = ClusterEvent(EventKind.UNLOAD, 5.0, 0.0, "", "unloaded m")
    state = ClusterState("lab", "1", ServingState.SERVING, model="m", layers=2, requests=(request,), events=(lost,))
    page = show(replace(state, stages=(stage(0, "gus", 0.5), stage(1, "fay"))), "cluster")
    assert page.inner_text("[data-key=Idle]").split("\n") == ["Idle", "50 %", "of the last 30 s with work"]
    assert [one.split("\n")[-1] for one in page.locator(".mac .facts").all_inner_texts()] == ["50 %", "\N{EN DASH}"]
    colours = [
        page.evaluate("(one) => one.style.getPropertyValue('--mac')", one.element_handle())
        for one in page.locator(".mac").all()
    ]
    shown = [
        page.evaluate("(one) => one.style.background", one.element_handle())
        for one in page.locator(".way > span:not([class])").all()
    ]
    assert shown[:2] == colours[::-1], "by the Mac's name, wherever it is in the list"
    former = page.locator(".legend > span:has-text('eve') .swatch")
    assert page.evaluate("(one) => one.style.background", former.element_handle()) == shown[2]
    assert len(set(shown)) == 3
    assert page.inner_text(".events .what") == "Unloaded"


def test_a_plan_speaks_of_the_forms_fields_and_leaves_names_of_macs_alone(show: Callable[..., Any]) -> None:
    workers = (worker("eve"), worker("fay"))
    state = ClusterState("lab", "1", ServingState.IDLE, workers=workers)
    found = {
        "model": "m", "layers": 1, "max_context": 9, "max_sequences": 1, "stages": to_json_types([stage(0, "fay")]),
        "forecast": None, "reasons": ["fay is the fastest", "one Mac is enough"],
        "spares": [{"worker": "eve", "why": "fay is enough"}],
    }  # fmt: skip
    page = show(state, "plan", found)
    page.fill("#plan-model", "m")
    page.click("#plan button.main")
    said = page.locator("#plan .reasons li")
    assert said.all_inner_texts() == ["fay is the fastest.", "One Mac is enough.", "eve: fay is enough."]
    page.fill("#plan-workers", "9")
    page.click("#plan button.main")
    assert page.inner_text("#plan [role=alert]") == "There are only 2 Macs now: eve, fay."
    wrong = {"error": {"message": "--layers: 'x' is not a range; lower --max-context or raise --memory-limit"}}
    page = show(state, "plan", wrong)
    page.fill("#plan-model", "m")
    page.click("#plan button.main")
    page.wait_for_selector("#plan [role=alert]:has-text('“Layers for each stage”: ')")
    assert "lower “Context in tokens” or raise --memory-limit" in page.inner_text("#plan [role=alert]")


def test_a_page_that_nobody_sees_does_not_watch(show: Callable[..., Any]) -> None:
    page = show(ClusterState("lab", "1", ServingState.IDLE), "cluster")
    page.wait_for_selector("#cluster h1")
    closed = page.evaluate(
        """() => {
            let closed = 0;
            const { close } = EventSource.prototype;
            EventSource.prototype.close = function () { closed += 1; close.call(this); };
            Object.defineProperty(document, "hidden", { value: true, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
            return closed;
        }"""
    )
    assert closed == 1
    with page.expect_request("**/api/events"):
        page.evaluate(
            """() => {
                delete document.hidden;
                document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )


def test_tables_align_their_columns(show: Callable[..., Any]) -> None:
    page = show(ClusterState("lab", "1", ServingState.IDLE), "chat")
    aligned = page.evaluate(
        """async () => {
            const { markdown } = await import("/page/markdown.js");
            const place = document.createElement("div");
            document.body.append(place);
            place.append(...markdown("|a|b|c|\\n|:-|:-:|-:|\\n|1|2|3|\\n"));
            return [...place.querySelectorAll("td")].map((cell) => getComputedStyle(cell).textAlign);
        }"""
    )
    assert aligned == ["left", "center", "right"]


def test_what_happened_stays_near_below_many_requests(show: Callable[..., Any]) -> None:
    requests = tuple(LiveRequest(f"r{i}", RequestState.DECODE, 9, 9, 1, i, 1.0) for i in range(FEED_REQUESTS))
    page = show(ClusterState("lab", "1", ServingState.SERVING, requests=requests), "cluster")
    listed = page.get_by_role("region", name="List of live requests")
    for size in (DESKTOP, PHONE):
        page.set_viewport_size(size)
        assert listed.bounding_box()["height"] <= size["height"] / 2
    listed.focus()
    page.keyboard.press("End")
    page.wait_for_function("document.activeElement.scrollTop > 0")


@pytest.mark.long
def test_the_page_can_be_used_by_keyboard_alone(faq: Served, visit: Callable[..., Any]) -> None:
    page = visit(faq.http, faq.key)
    page.wait_for_selector(".mac")

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent || document.activeElement.ariaLabel") == name:
                return
        raise AssertionError(f"Tab does not lead to {name}")

    tab_to("Chat")
    page.keyboard.press("Enter")
    tab_to("Message")
    page.keyboard.type("What is a hop?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat .answer:not([aria-busy])")
    page.locator("nav a[href='#plan']").focus()
    page.keyboard.press("Enter")
    page.locator("#plan-model").focus()
    page.keyboard.type("faq")
    page.keyboard.press("Enter")
    page.wait_for_selector("#plan .result table")


@pytest.mark.long
def test_an_answer_cannot_reach_the_page(faq: Served, visit: Callable[..., Any]) -> None:
    """A model's text with HTML, pictures and links of every kind becomes elements without effects."""
    page = visit(faq.http, faq.key)
    text = (
        "<img src=x onerror=alert(1)><script>alert(2)</script> ![p](http://evil.example/p.png) "
        "[a](javascript:alert(3)) [b](https://good.example/) [c](data:text/html,x) **bold** `<b>`\n\n<iframe src=http://evil.example></iframe>\n"
    )
    made = page.evaluate(
        """async (text) => {
            const { markdown } = await import("/page/markdown.js");
            const place = document.createElement("div");
            place.append(...markdown(text));
            document.body.append(place);
            return { tags: [...place.querySelectorAll("*")].map((one) => one.localName),
                     links: [...place.querySelectorAll("a")].map((one) => [one.href, one.rel]), text: place.innerText };
        }""",
        text,
    )
    assert set(made["tags"]) <= {"p", "span", "a", "strong", "code"}
    assert [href for href, _ in made["links"]] == ["http://evil.example/p.png", "https://good.example/"]
    assert all("noopener" in rel for _, rel in made["links"])
    assert "<script>alert(2)</script>" in made["text"]
    assert not any("evil.example" in url for url in page.asked)


@pytest.mark.long
def test_a_stopped_answer_keeps_what_there_is(faq: Served, visit: Callable[..., Any]) -> None:
    page = visit(f"{faq.http}/#chat", faq.key)
    page.fill("#chat textarea", "Tell a long story.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat .answer")
    page.keyboard.press("Escape")
    page.wait_for_selector("#chat .answer:not([aria-busy])")
    assert page.inner_text("#chat .composer button.main") == "Send"
    assert ask(page, "What is a hop?")


@pytest.mark.long
def test_two_hundred_requests_at_once_are_shown_and_end(faq: Served, visit: Callable[..., Any]) -> None:
    page = visit(faq.http, faq.key)
    page.wait_for_selector(".mac")
    body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}

    def send(_: int) -> int:
        url = f"{faq.openai}/completions"
        return httpx.post(url, json=body, headers=faq.bearer, timeout=170).status_code

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = [pool.submit(send, i) for i in range(200)]
        page.wait_for_selector("table.requests tbody tr")
        page.wait_for_selector("text=not shown")
        assert {answer.result() for answer in answers} == {200}
    page.wait_for_selector("#cluster >> text=None.")
    assert not page.problems


@pytest.mark.long
@pytest.mark.skipif(not AXE, reason="MACPIPE_AXE does not name axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(faq: Served, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(faq.http, faq.key, color_scheme=scheme)
    page.wait_for_selector(".mac")
    page.evaluate(Path(AXE).read_text())
    for view in ("cluster", "chat", "plan"):
        page.click(f"nav a[href='#{view}']")
        page.wait_for_selector(f"#{view} h1")
        found = page.evaluate("axe.run()")["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, view


@pytest.mark.long
def test_without_javascript_there_is_a_sentence_and_a_command(faq: Served, visit: Callable[..., Any]) -> None:
    page = visit(faq.http, java_script_enabled=False)
    assert "needs JavaScript" in page.inner_text("main")
    assert "curl http" in page.inner_text("main pre")


@contextmanager
def started(folder: Path, *, mtls: bool, workers: tuple[str, ...]) -> Iterator[tuple[Cluster, str]]:
    cluster = Cluster(folder, mtls=mtls)
    try:
        for name in workers:
            cluster.worker(name)
        http = f"127.0.0.1:{free_port()}"
        options = ("--workers", "2", "--port", str(free_port()), "--http", http)
        cluster.serve("faq", *options).wait_for("serving faq")
        yield cluster, f"http://{http}"
    finally:
        cluster.close()


@pytest.mark.long
def test_a_killed_worker_is_seen_within_seconds_and_its_return_to_service_too(
    tmp_path: Path, visit: Callable[..., Any]
) -> None:
    with started(tmp_path, mtls=False, workers=("eve", "fay", "gus")) as (cluster, http):
        page = visit(http)
        page.wait_for_selector(".mac h3:has-text('fay')")
        seen = page.evaluate_handle(WHEN_LOST, "fay")
        (fay,) = (daemon for daemon in cluster.daemons if daemon.name == "fay")
        killed = time.time()
        os.killpg(fay.process.pid, signal.SIGKILL)
        assert page.evaluate("async (seen) => (await seen.at) / 1000", seen) - killed <= SEEN_S
        page.wait_for_selector(".events .recovery")
        page.wait_for_selector(".mac h3:has-text('gus')")


WHEN_LOST = """(name) => {
    const isLost = () => document.getElementById("pulse").textContent !== "Serving"
        || document.querySelector(".events .recovery")
        || ![...document.querySelectorAll(".mac h3")].some((mac) => mac.textContent === name);
    return { at: new Promise((resolve) => {
        const look = () => isLost() && resolve(Date.now());
        new MutationObserver(look).observe(document.body, { childList: true, characterData: true, subtree: true });
    }) };
}"""
"""When the page shows that a Mac was lost, in milliseconds of this machine's clock; it is to be awaited."""


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KeyStore, str]]:
    """A cluster with keys, and the address of its page."""
    with started(tmp_path_factory.mktemp("keyed"), mtls=True, workers=("eve", "fay")) as (cluster, http):
        yield KeyStore(cluster.lead.folder), http


@contextmanager
def other_origin() -> Iterator[tuple[int, list[str]]]:
    """Serve an empty page on a port of its own. Yields the port, and the cookies that browsers send with a visit."""
    cookies: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cookies.append(self.headers.get("cookie", ""))
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_address[1], cookies
        finally:
            server.shutdown()


ATTACK = """async (address) => {
    const blind = { mode: "no-cors", credentials: "include" };
    const open = { credentials: "include" };
    const asked = [
        ...["unload", "load", "plan", "chat"].map((path) => [path, { ...blind, method: "POST", body: "{}" }]),
        ["session", { ...open, method: "DELETE" }], ["unload", { ...open, method: "POST" }],
        ["session", open], ["session", blind], ["events", blind],
    ];
    const read = [];
    for (const [path, options] of asked) {
        try {
            read.push((await (await fetch(`${address}/api/${path}`, options)).text()).length);
        } catch {
            read.push(0);
        }
    }
    return read;
}"""
"""What a page of another origin can try with a visitor's cookie; returns the characters that it read each time."""


def count_responses(http: str, key: str) -> Counter[tuple[str, str]]:
    """Return how many responses the coordinator has sent, by route and status."""
    told = httpx.get(f"{http}/metrics", headers={"authorization": f"Bearer {key}"}).text
    found = re.findall(r'^macpipe_http_responses_total{route="(/api/[^"]*)",status="(\d+)"} (\S+)', told, re.MULTILINE)
    return Counter({(route, status): int(float(count)) for route, status, count in found})


@pytest.mark.long
def test_a_stolen_cookie_is_of_no_use_on_another_origin(keyed: tuple[KeyStore, str], visit: Callable[..., Any]) -> None:
    """Cookies know no ports: a browser sends them from another port of the same host, and the coordinator refuses."""
    keys, http = keyed
    _, text = keys.create("ann", KeyScope.ADMIN)
    page = visit(http, text)
    page.wait_for_selector(".mac")
    (stolen,) = page.context.cookies()
    assert (stolen["httpOnly"], stolen["sameSite"]) == (True, "Strict")
    with other_origin() as (port, cookies):
        for host, sent in (("127.0.0.1", True), ("localhost", False)):
            evil = visit("about:blank")
            evil.context.add_cookies([stolen])
            evil.goto(f"http://{host}:{port}")
            assert (stolen["value"] in cookies[-1]) == sent, host
            before = count_responses(http, text)
            read = evil.evaluate(ATTACK, http)
            assert set(read) == {0}, host
            answers = count_responses(http, text) - before
            assert {status for _, status in answers} == {"403"}, host
            assert answers.total() == len(read), host
    page.reload()
    page.wait_for_selector("#pulse:has-text('Serving')")
    page.wait_for_selector("button:has-text('Sign out')")


@pytest.mark.long
def test_keys_in_a_browser(keyed: tuple[KeyStore, str], visit: Callable[..., Any]) -> None:
    """A wrong key, one without the right to plan, and one that is revoked while its page is open."""
    keys, http = keyed
    _, text = keys.create("amy", KeyScope.INFERENCE)
    page = visit(http)
    sign_in(page, text[:-1] + ("a" if text[-1] != "a" else "b"))
    page.wait_for_selector("[role=alert]:has-text('unknown or was revoked')")
    sign_in(page, text)
    page.wait_for_selector(".mac h3:has-text('eve')")
    page.click("nav a[href='#plan']")
    page.wait_for_selector("text=needs a key with the scope admin")
    assert page.is_disabled("#plan button.main")
    assert page.evaluate("document.cookie") == "", "scripts cannot read the session"
    keys.revoke("amy")
    page.wait_for_selector("#login #key")
    assert "sign in again" in page.inner_text("#login")


def test_the_page_shows_who_leads_and_who_stands_by(show: Callable[..., Any]) -> None:
    standbys = (
        StandbyState("mac-2", in_sync=True),
        StandbyState("mac-3", behind=7),
        StandbyState("mac-4", problem="cannot follow mac-1: the disk is full", away=True),
        StandbyState("mac-5", problem="it does not answer", away=True, silent_seconds=720.0),
    )
    leader = CoordinatorName("mac-1", "i")
    led = LeadershipState(CoordinatorRole.LEADER, 4, leader, 90.0, Replicate.SYNC, standbys)
    page = show(ClusterState("lab", "1", ServingState.IDLE, leadership=led), "cluster")
    page.wait_for_selector("#coordinators-title")
    section = page.locator("section[aria-labelledby=coordinators-title]")
    assert section.locator("li").all_inner_texts() == [
        "mac-1 leads · for 1 min · term 4",
        "mac-2 stands by · in sync: answers go on here if the leader is lost",
        "mac-3 stands by · 7 updates behind",
        "mac-4 does not follow · cannot follow mac-1: the disk is full",
        "mac-5 lost · has not answered for 12 min",
    ]
    page = show(ClusterState("lab", "1", ServingState.IDLE), "cluster")
    page.wait_for_selector("h1")
    assert page.locator("#coordinators-title").count() == 0, "nothing without other coordinators"
    assert not page.problems
