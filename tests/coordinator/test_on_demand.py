"""Models that are loaded when a request needs them, over deployments in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.coordinator.copy_keeper import CopyGoal
from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.load_tasks import LoadTasks
from cluster.coordinator.model_catalog import ModelCatalog, ModelEntry
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.reporter import LoadWatch
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.errors import (
    BadCheckpoint,
    DoesNotFit,
    MacpipeError,
    ModelNotFound,
    ModelTooLarge,
    NotLeader,
    NotServing,
    StaleTerm,
    WorkerLost,
)
from cluster.core.load_limits import FAILED_RETRY_S, LOAD_TRIES, MIN_RESIDENT_S, REFUSED_RETRY_S

pytestmark = pytest.mark.anyio
SIZES = {"chat": 6, "title": 3, "code": 5, "vast": 99}
MEMORY = 10
OLD_S = 2 * MIN_RESIDENT_S


@dataclass
class MemoryDeployment:
    """A deployment that holds bytes on one Mac."""

    cluster: MemoryCluster
    name: str
    model_info: Any = None
    loaded_at: float = 0.0
    used_at: float = 0.0
    has_requests: bool = False
    is_loading: bool = False
    caches: int = 0
    """Bytes that it holds besides, since it was loaded alone."""
    state: ServingState = ServingState.SERVING
    watch: LoadWatch = field(default_factory=LoadWatch)

    copies: list[MemoryCopy] = field(default_factory=list)

    @property
    def replicas(self) -> tuple[MemoryCopy, ...]:
        return (MemoryCopy(self.name), *self.copies)

    async def remove_copy(self, copy: MemoryCopy) -> None:
        self.copies.remove(copy)
        self.cluster.unloaded.append(copy.holder)

    async def wait_loaded(self) -> None: ...

    lacks_macs = False

    async def ask_room(self, order: LoadOrder) -> MemoryDeployment:
        self.cluster.asked += 1
        return self

    def refusal(self, leaving: Collection[str]) -> DoesNotFit | None:
        others = [one for one in self.cluster.loaded() if one is not self]
        held = sum(SIZES[o.name] + o.caches for o in others for copy in o.replicas if copy.holder not in leaving)
        missing = held + SIZES[self.name] - self.cluster.memory
        return DoesNotFit(f"{self.name} lacks {missing}", missing_bytes=str(missing)) if missing > 0 else None

    async def unload(self, may_unload: Callable[[], bool]) -> bool:
        await asyncio.sleep(0)
        if not may_unload():
            return False
        self.model_info, self.caches = None, 0
        self.cluster.unloaded.append(self.name)
        return True

    async def read_context(self, order: LoadOrder) -> int:
        self.cluster.asked += 1
        if error := self.cluster.failing.get(self.name):
            raise error
        return SIZES[self.name] * 1024

    async def read(self, order: LoadOrder) -> ClosedLater:
        return ClosedLater(self.name)


@dataclass(frozen=True)
class MemoryCopy:
    holder: str


@dataclass
class ClosedLater:
    name: str
    closed: bool = False

    async def close(self) -> None:
        self.closed = True


class MemoryTable(dict[str, MemoryDeployment]):
    def __init__(self, cluster: MemoryCluster, catalog: ModelCatalog) -> None:
        self.cluster, self.catalog = cluster, catalog
        self.lead_change = LeadChange()

    def copy_goals(self) -> list[CopyGoal]:
        entries = [entry for entry in self.catalog if entry.name in self]
        return [CopyGoal(self[entry.name], entry.replicas, entry.priority) for entry in entries]  # type: ignore[arg-type]

    def forget_unloaded(self) -> None: ...

    def own_name(self, name: str) -> str:
        return name

    def __missing__(self, name: str) -> MemoryDeployment:
        return self.setdefault(name, MemoryDeployment(self.cluster, name))


class MemoryCluster:
    """A coordinator whose models are sizes. ``gate`` holds loads back while it is clear."""

    def __init__(self, *entries: ModelEntry) -> None:
        self.deployments = MemoryTable(self, ModelCatalog(entries))
        self.state = ServingState.SERVING
        self.memory = MEMORY
        self.now = 1000.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.unloaded: list[str] = []
        self.failing: dict[str, MacpipeError] = {}
        self.asked = 0
        self.loads = LoadTasks()
        self.demand = OnDemand(self, 120.0, lambda: self.now, self.sleep)  # type: ignore[arg-type]

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    def loaded(self) -> list[MemoryDeployment]:
        return [one for one in self.deployments.values() if one.model_info]

    def served_model(self, model: str, adapter: str = "") -> Any:
        found = self.deployments[self.deployments.catalog.resolve(model)[0].name].model_info
        if found is None:
            raise NotServing("no model is loaded")
        return found

    async def load(self, order: LoadOrder, follower: Any = None, *, name: str = "") -> None:
        self.begun.append(name)
        await self.gate.wait()
        if error := self.failing.get(name):
            raise error
        self.put(name)

    def put(self, name: str, used_ago: float = 0.0, loaded_ago: float = 0.0) -> MemoryDeployment:
        deployment = self.deployments[name]
        deployment.model_info = f"info of {name}"
        deployment.loaded_at, deployment.used_at = self.now - loaded_ago, self.now - used_ago
        return deployment

    async def ask(self, name: str, wait_s: float | None = None) -> str:
        async with self.demand.hold(name, wait_s=wait_s) as held:
            return str(held.model_info) if not held.fallback else f"{held.fallback} answers"


def entry(name: str, **more: Any) -> ModelEntry:
    return ModelEntry(name, LoadOrder(str(Path("/models") / name)), **more)


def three(**more: Any) -> MemoryCluster:
    return MemoryCluster(entry("chat"), entry("title"), entry("code", **more))


async def test_a_model_that_left_is_ready_to_be_asked_for_unless_its_load_has_just_failed() -> None:
    assert not MemoryCluster(entry("chat")).demand.would_load(None), "people alone load it"
    cluster = MemoryCluster(entry("chat", idle_unload_s=60.0))
    assert cluster.demand.would_load(None)
    cluster.failing["chat"] = BadCheckpoint("the files are damaged")
    with pytest.raises(BadCheckpoint):
        await cluster.ask("chat")
    assert not cluster.demand.would_load("chat")
    cluster.failing.clear()
    cluster.now += FAILED_RETRY_S
    assert cluster.demand.would_load("chat")
    assert await cluster.ask("chat") == "info of chat"
    assert not cluster.demand.would_load("chat"), "it is loaded"


async def test_the_context_of_a_model_that_is_not_loaded_is_read_once_for_each_order() -> None:
    cluster = three()
    cluster.failing["title"] = BadCheckpoint("the files are damaged")
    assert [await cluster.demand.contexts.read(name) for name in ("chat", "chat", "title", "title")] == [
        6144,
        6144,
        0,
        0,
    ]
    assert cluster.asked == 3, "what could not be read may be there by now"
    with pytest.raises(ModelNotFound):
        await cluster.demand.contexts.read("nobody")


async def test_requests_for_one_model_share_its_load_and_the_least_recently_used_model_leaves_for_it() -> None:
    cluster = three()
    cluster.put("chat", used_ago=50, loaded_ago=OLD_S)
    cluster.put("title", used_ago=40, loaded_ago=OLD_S)
    assert await asyncio.gather(*(cluster.ask("code") for _ in range(5))) == ["info of code"] * 5
    assert (cluster.begun, cluster.unloaded) == (["code"], ["chat"])
    assert await cluster.ask("title") == "info of title"
    assert cluster.begun == ["code"]


async def test_a_load_goes_on_when_its_only_waiter_gave_up() -> None:
    cluster = three()
    cluster.gate.clear()
    waiting = asyncio.create_task(cluster.ask("chat"))
    while not cluster.begun:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(NotServing, match=r"^chat is not loaded yet .*try again") as late:
        await cluster.ask("chat", wait_s=0.0)
    assert late.value.retry_after_s == FAILED_RETRY_S
    cluster.gate.set()
    assert await cluster.ask("chat") == "info of chat"
    assert cluster.begun == ["chat"]
    assert not cluster.demand._holds


async def test_every_waiter_gets_the_error_of_a_load_and_the_next_try_waits_longer_each_time() -> None:
    cluster = three()
    cluster.failing["chat"] = BadCheckpoint("the files are damaged")
    found = await asyncio.gather(*(cluster.ask("chat") for _ in range(3)), return_exceptions=True)
    assert [str(one) for one in found] == ["the files are damaged"] * 3
    for retry_s in (FAILED_RETRY_S, 2 * FAILED_RETRY_S):
        tries = len(cluster.begun)
        cluster.now += retry_s - 0.1
        with pytest.raises(BadCheckpoint):
            await cluster.ask("chat")
        assert len(cluster.begun) == tries
        cluster.now += 0.2
        with pytest.raises(BadCheckpoint):
            await cluster.ask("chat")
        assert len(cluster.begun) == tries + 1
    cluster.failing.clear()
    mended = ModelEntry("chat", LoadOrder("/models/mended"))
    cluster.deployments.catalog = ModelCatalog([mended, *cluster.deployments.catalog.entries[1:]])
    assert await cluster.ask("chat") == "info of chat", "another order is tried at once"


async def test_a_model_that_can_never_fit_evicts_nothing_and_is_not_planned_for_each_request() -> None:
    cluster = MemoryCluster(entry("chat"), entry("vast"))
    cluster.put("chat", loaded_ago=OLD_S, used_ago=OLD_S)
    for _ in range(3):
        with pytest.raises(DoesNotFit, match=r"^vast lacks 89$"):
            await cluster.ask("vast")
    assert (cluster.asked, cluster.unloaded, cluster.begun) == (1, [], [])
    cluster.now += REFUSED_RETRY_S
    with pytest.raises(ModelTooLarge):
        await cluster.ask("vast")
    assert cluster.asked == 2
    cluster.now += REFUSED_RETRY_S
    cluster.memory = SIZES["vast"] + SIZES["chat"]
    assert await cluster.ask("vast") == "info of vast", "a Mac has joined"


async def test_what_is_busy_held_or_pinned_stays() -> None:
    cluster = MemoryCluster(entry("chat"), entry("title", pin=True), entry("code"))
    chat = cluster.put("chat", loaded_ago=OLD_S, used_ago=OLD_S)
    cluster.put("title", loaded_ago=OLD_S, used_ago=OLD_S)
    chat.has_requests = True
    with pytest.raises(DoesNotFit, match="beside chat, which is busy, and title, which is pinned"):
        await cluster.ask("code")
    chat.has_requests = False
    cluster.now += REFUSED_RETRY_S
    async with cluster.demand.hold("chat"):
        with pytest.raises(DoesNotFit, match="chat, which is busy"):
            await cluster.ask("code")
    assert cluster.unloaded == []


async def test_a_model_that_leaves_for_its_caches_alone_comes_back_and_counts_as_used_when_it_was() -> None:
    cluster = three()
    title = cluster.put("title", loaded_ago=OLD_S, used_ago=OLD_S)
    title.caches = MEMORY - SIZES["title"]
    assert await cluster.ask("code") == "info of code"
    while not title.model_info:
        await asyncio.sleep(0)
    assert (cluster.unloaded, cluster.begun) == (["title"], ["code", "title"])
    began, cluster.memory = cluster.now, SIZES["code"] + SIZES["chat"]
    assert await cluster.ask("chat") == "info of chat"
    assert (cluster.unloaded, cluster.now) == (["title", "title"], began), "it need not stay: nobody asked for it"


@pytest.mark.parametrize("recovers", [True, False])
async def test_a_model_that_leaves_for_one_that_recovers_comes_back_once_that_serves(recovers: bool) -> None:
    cluster = three()
    title, code = cluster.put("title", used_ago=1), cluster.put("code")
    title.caches, code.state = MEMORY - SIZES["title"], ServingState.RECOVERING
    assert await cluster.demand.make_way("code")
    returning = asyncio.gather(*cluster.demand._returns.tasks)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not title.model_info, "the other one chooses its Macs first"
    code.state = ServingState.SERVING if recovers else ServingState.FAILED
    await returning
    assert (title.model_info is not None, cluster.begun) == (recovers, ["title"] if recovers else [])


async def test_what_does_not_fit_beside_the_model_that_it_left_for_does_not_come_back() -> None:
    cluster = three()
    cluster.put("chat", loaded_ago=OLD_S, used_ago=OLD_S)
    assert await cluster.ask("code") == "info of code"
    await asyncio.gather(*cluster.demand._returns.tasks)
    assert (cluster.unloaded, cluster.begun) == (["chat"], ["code"])


async def test_copies_leave_before_models_even_if_they_are_used_but_not_those_asked_for_by_number() -> None:
    cluster = MemoryCluster(entry("title", replicas=None, pin=True), entry("code"), entry("chat", idle_unload_s=9.0))
    title = cluster.put("title")
    title.has_requests = True
    title.copies = [MemoryCopy("title#2"), MemoryCopy("title#3")]
    assert await cluster.ask("code") == "info of code"
    assert cluster.unloaded == ["title#3", "title#2"]
    cluster.deployments["code"].model_info = None
    title.copies = [MemoryCopy("title#2"), MemoryCopy("title#3")]
    by_number = [entry("title", replicas=3, pin=True), *cluster.deployments.catalog.entries[1:]]
    cluster.deployments.catalog = ModelCatalog(by_number)
    with pytest.raises(DoesNotFit, match="chat does not fit beside title"):
        await cluster.ask("chat")
    assert len(title.copies) == 2


async def test_a_victim_that_gets_a_request_while_it_is_chosen_stays() -> None:
    cluster = three()
    chat = cluster.put("chat", loaded_ago=OLD_S, used_ago=OLD_S)
    unload = chat.unload

    async def used_just_now(may_unload: Callable[[], bool]) -> bool:
        chat.has_requests = True
        return await unload(may_unload)

    chat.unload = used_just_now  # type: ignore[method-assign]
    with pytest.raises(DoesNotFit, match="beside chat, which is busy"):
        await cluster.ask("code")
    assert chat.model_info


async def test_two_models_do_not_evict_each_other_in_turn() -> None:
    cluster = three()
    cluster.put("chat", loaded_ago=1.0)
    began = cluster.now
    assert await cluster.ask("code") == "info of code"
    assert cluster.now - began == MIN_RESIDENT_S - 1.0
    assert cluster.unloaded == ["chat"]


async def test_a_load_of_an_operator_makes_room_at_once_but_ends_no_request() -> None:
    cluster = three()
    chat = cluster.put("chat", loaded_ago=1.0)
    began = cluster.now
    code = cluster.deployments.catalog.find("code")
    chat.has_requests = True
    with pytest.raises(DoesNotFit, match="beside chat, which is busy"):
        await cluster.demand.load(code.order, name="code")
    chat.has_requests = False
    await cluster.demand.load(code.order, name="code")
    assert (cluster.unloaded, cluster.begun, cluster.now) == (["chat"], ["code"], began)
    await cluster.demand.load(code.order, name="code")
    assert cluster.begun == ["code", "code"], "it is replaced"


async def test_an_idle_model_leaves_for_one_that_recovers_but_only_if_that_suffices() -> None:
    cluster = three()
    cluster.put("code")
    chat, title = cluster.put("chat", used_ago=2), cluster.put("title", used_ago=1)
    chat.has_requests = title.has_requests = True
    assert not await cluster.demand.make_way("code")
    chat.has_requests = title.has_requests = False
    assert await cluster.demand.make_way("code")
    assert (cluster.unloaded, cluster.begun) == (["chat"], [])
    assert not await cluster.demand.make_way("code"), "there is room"
    assert not await cluster.demand.make_way("gone")


async def test_idle_models_leave_after_their_time_unless_they_are_pinned_or_used() -> None:
    cluster = MemoryCluster(
        entry("chat", idle_unload_s=60.0, pin=True), entry("title", idle_unload_s=60.0), entry("code")
    )
    cluster.put("chat", used_ago=100)
    title = cluster.put("title", used_ago=59)
    await cluster.demand.unload_idle()
    async with cluster.demand.hold("title"):
        cluster.now += 2
        await cluster.demand.unload_idle()
    cluster.now += 59
    await cluster.demand.unload_idle()
    title.has_requests = True
    cluster.now += 2
    await cluster.demand.unload_idle()
    assert cluster.unloaded == []
    title.has_requests = False
    await cluster.demand.unload_idle()
    assert cluster.unloaded == ["title"]
    assert await cluster.ask("title") == "info of title"


async def test_when_an_idle_model_leaves_is_known() -> None:
    chat, title, code = entry("chat", idle_unload_s=60.0, pin=True), entry("title", idle_unload_s=60.0), entry("code")
    cluster = MemoryCluster(chat, title, code)
    deployment = cluster.put("title", used_ago=50)
    assert [cluster.demand.idle_left_s(one) for one in (chat, title, code)] == [None, 10.0, None]
    deployment.has_requests = True
    assert cluster.demand.idle_left_s(title) == 60.0
    deployment.has_requests = False
    cluster.now += 30
    assert cluster.demand.idle_left_s(title) == 0.0


async def test_the_fallback_answers_while_a_model_cannot_be_served_and_its_own_fallback_after_it() -> None:
    cluster = MemoryCluster(entry("vast", fallback="code"), entry("title"), entry("code", fallback="title"))
    assert await cluster.ask("vast") == "code answers"
    cluster.deployments["code"].model_info = None
    cluster.failing["code"] = BadCheckpoint("the files are damaged")
    assert await cluster.ask("vast") == "title answers"
    assert await cluster.ask("code") == "title answers"
    cluster.deployments["title"].model_info = None
    cluster.failing["title"] = NotServing("no")
    with pytest.raises(DoesNotFit, match="vast lacks"):
        await cluster.ask("vast")
    assert not cluster.demand._holds


async def test_the_fallback_answers_a_request_that_has_waited_long_enough_but_is_not_loaded_for_it() -> None:
    cluster = MemoryCluster(entry("code", fallback="title"), entry("title"))
    cluster.gate.clear()
    with pytest.raises(NotServing, match="code is not loaded yet"):
        await cluster.ask("code", 0.0)
    while not cluster.begun:
        await asyncio.sleep(0.001)
    assert cluster.begun == ["code"]
    cluster.put("title")
    assert await cluster.ask("code", 0.0) == "title answers"
    assert not cluster.demand._holds
    await cluster.demand.close()


async def test_the_fallback_answers_for_a_model_that_cannot_recover() -> None:
    cluster = MemoryCluster(entry("chat", fallback="title"), entry("title"))
    chat = cluster.put("chat")
    assert await cluster.ask("chat") == "info of chat"
    chat.state = ServingState.RECOVERING
    assert await cluster.ask("chat") == "info of chat"
    assert cluster.demand.is_ready("chat")
    chat.state = ServingState.FAILED
    assert not cluster.demand.is_ready("chat"), "its fallback may have to be loaded"
    assert await cluster.ask("chat") == "title answers"


async def test_a_load_that_loses_a_worker_is_tried_again_for_the_same_request() -> None:
    cluster = three()
    losses = [WorkerLost("ada is gone"), WorkerLost("bob is gone")]
    load = cluster.load

    async def lose_workers(order: LoadOrder, *, name: str) -> None:
        if losses:
            raise losses.pop()
        await load(order, name=name)

    cluster.load = lose_workers  # type: ignore[method-assign]
    assert await cluster.ask("chat") == "info of chat"
    losses += [WorkerLost("ada is gone")] * LOAD_TRIES
    with pytest.raises(WorkerLost):
        await cluster.ask("title")
    assert not losses


async def test_a_stream_learns_within_a_moment_whether_it_must_wait() -> None:
    cluster = MemoryCluster(entry("chat"), entry("vast"), entry("code", fallback="chat"))
    with_room = cluster.demand
    assert await with_room.await_ready("vast", 1.0), "it is refused at once"
    assert await with_room.await_ready("chat", 1.0)
    cluster.deployments["chat"].model_info = None
    cluster.gate.clear()
    assert not await with_room.await_ready("chat", 0.0)
    cluster.failing["code"] = BadCheckpoint("the files are damaged")
    cluster.demand._note_failure(cluster.deployments.catalog.find("code"), cluster.failing["code"])
    assert not await with_room.await_ready("code", 0.0), "its fallback is being loaded"
    cluster.gate.set()
    assert await with_room.await_ready("code", 10.0)


async def test_a_single_model_is_loaded_by_people_alone() -> None:
    cluster = MemoryCluster(entry("chat"))
    with pytest.raises(NotServing, match="no model is loaded"):
        cluster.demand.is_ready("chat")
    with pytest.raises(NotServing, match="no model is loaded"):
        await cluster.ask("chat")
    assert cluster.begun == []
    with pytest.raises(ModelNotFound):
        await three().ask("nobody")


async def test_requests_wait_for_a_single_model_that_a_new_leader_loads_again() -> None:
    cluster = MemoryCluster(entry("chat"))
    change = cluster.deployments.lead_change
    change.begin_return()
    assert not cluster.demand.is_ready("chat")
    assert not await cluster.demand.await_ready("chat", 0.01)
    with pytest.raises(ModelNotFound):
        cluster.demand.is_ready("nobody")
    waiting = [asyncio.create_task(cluster.ask("chat", wait_s)) for wait_s in (None, 60.0)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    cluster.put("chat")
    change.end_return()
    assert await asyncio.gather(*waiting) == ["info of chat"] * 2
    assert cluster.begun == [], "requests load nothing themselves"


async def test_requests_wait_no_longer_than_they_may_for_what_a_new_leader_loads() -> None:
    cluster = MemoryCluster(entry("chat"))
    cluster.deployments.lead_change.begin_return()
    cluster.demand.load_wait_s = 0.01
    with pytest.raises(NotServing, match="no model is loaded"):
        await cluster.ask("chat")


async def test_requests_that_were_not_accepted_follow_to_the_next_leader() -> None:
    cluster = MemoryCluster(entry("chat"))
    change, elsewhere = cluster.deployments.lead_change, NotLeader("bob leads now")
    change.begin_return()
    waiting = asyncio.create_task(cluster.ask("chat"))
    await asyncio.sleep(0.01)
    change.end(elsewhere)
    with pytest.raises(NotLeader, match="bob leads now"):
        await waiting
    cluster.put("chat")
    with pytest.raises(NotLeader, match="bob leads now"):
        async with cluster.demand.hold("chat"):
            raise NotServing("the model was unloaded while the request was being tokenized")
    with pytest.raises(ModelNotFound):
        async with cluster.demand.hold("chat"):
            raise ModelNotFound("the request's own error stays")


@pytest.mark.parametrize("names", [("chat",), ("chat", "title")])
async def test_requests_follow_at_once_whatever_they_wait_for(names: tuple[str, ...]) -> None:
    """Say, for the check of a large grammar: their leader's port is closed soon."""
    cluster, held = MemoryCluster(*map(entry, names)), asyncio.Event()
    cluster.put("chat")

    async def check() -> None:
        async with cluster.demand.hold("chat"):
            held.set()
            await asyncio.Event().wait()

    checking = asyncio.create_task(check())
    await held.wait()
    for _ in range(3):
        cluster.deployments.lead_change.end(NotLeader("bob leads now"))
        await asyncio.sleep(0)
    with pytest.raises(NotLeader, match="bob leads now"):
        await checking
    assert not cluster.demand._holds
    assert not cluster.deployments.lead_change._waits


async def test_requests_that_wait_for_a_load_follow_to_the_next_leader() -> None:
    cluster = MemoryCluster(entry("chat", fallback="title"), entry("title"), entry("code"))
    change, elsewhere = cluster.deployments.lead_change, NotLeader("bob leads now")
    cluster.gate.clear()
    asked = [("chat", None), ("chat", 60.0), ("code", None)]  # the last one waits until the turn comes to its load
    waiting = [asyncio.create_task(cluster.ask(name, wait_s)) for name, wait_s in asked]
    waiting.append(asyncio.create_task(cluster.demand.await_ready("chat", 60.0)))
    while not cluster.begun:
        await asyncio.sleep(0)
    change.end(elsewhere)
    await cluster.demand.close()
    assert await asyncio.gather(*waiting, return_exceptions=True) == [elsewhere] * 4
    for name in ("chat", "title"):
        with pytest.raises(NotLeader, match="bob leads now"):
            await cluster.ask(name)
    assert cluster.begun == ["chat"], "none begins any more"


async def test_requests_follow_if_their_load_fails_since_the_workers_are_led_elsewhere() -> None:
    cluster = three()
    cluster.gate.clear()
    cluster.failing["chat"] = StaleTerm("the call is of term 3, but this worker has granted term 4")
    waiting = asyncio.create_task(cluster.ask("chat"))
    while not cluster.begun:
        await asyncio.sleep(0)
    cluster.deployments.lead_change.end(NotLeader("bob leads now"))
    cluster.gate.set()
    with pytest.raises(NotLeader, match="bob leads now"):
        await waiting


async def test_a_request_for_a_tokenizer_alone_follows_to_the_next_leader() -> None:
    cluster = three()

    async def read(order: LoadOrder) -> ClosedLater:
        await asyncio.sleep(0)
        cluster.deployments.lead_change.end(NotLeader("bob leads now"))
        raise NotServing("the reader is closed")

    cluster.deployments["code"].read = read  # type: ignore[method-assign]
    with pytest.raises(NotLeader, match="bob leads now"):
        async with cluster.demand.hold_tokenizer("code"):
            raise AssertionError("it is not read")


async def test_a_tokenizer_is_read_without_a_load() -> None:
    cluster = three()
    async with cluster.demand.hold_tokenizer("code") as info:
        assert isinstance(info, ClosedLater)
        assert not info.closed
    assert info.closed
    assert cluster.begun == []
    cluster.put("code")
    async with cluster.demand.hold_tokenizer("code") as info:
        assert info == "info of code"  # type: ignore[comparison-overlap]


async def test_closing_ends_loads_and_their_waiters() -> None:
    cluster = three()
    cluster.gate.clear()
    waiting = asyncio.create_task(cluster.ask("chat"))
    while not cluster.begun:
        await asyncio.sleep(0)
    await cluster.demand.close()
    with pytest.raises(NotServing, match="stopping"):
        await waiting
