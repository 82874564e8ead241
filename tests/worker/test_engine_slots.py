"""Which engine loads a slice, what leaves memory for it, and what one engine's end leaves alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from cluster.core.errors import DoesNotFit, MacpipeError, StaleEpoch, WorkerLost
from cluster.core.limits import MAX_SLICES
from cluster.v1 import worker_pb2 as pb
from cluster.worker import engine_slots
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.pipe_messages import Hello, Reported
from cluster.worker.slice_description import describe_slices, find_problem

pytestmark = pytest.mark.anyio
LIMIT = 1000


class Engine:
    """Stands in for a supervisor: its engine runs until it is killed, and remembers what it was asked."""

    started: list[Engine]
    fails = False

    def __init__(self, launcher: EngineLauncher, lag: Any, number: int = 0) -> None:
        self.number, self.problem = number, ""
        self.hello: Hello | None = Hello(100 + number, "", "", "", "", LIMIT, LIMIT)
        self.asked: list[int] = []
        self.computing = False
        self._killed = anyio.Event()
        Engine.started.append(self)

    async def run(self) -> None:
        await anyio.sleep_forever()

    async def run_once(self) -> None:
        try:
            await self._killed.wait()
        finally:
            self.hello = None

    async def wait_started(self) -> None:
        if Engine.fails:
            raise WorkerLost("the engine ended before it was ready")

    async def ask(self, make: Callable[[int], Any]) -> None:
        self.asked.append(make(1).epoch)

    async def report(self) -> Reported:
        if self.problem:
            raise WorkerLost(self.problem)
        return Reported(1, 10 + self.number, 1)

    @property
    def killed(self) -> bool:
        return self._killed.is_set()

    def reset(self, why: str) -> None:
        self._killed.set()


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineSlots]:
    Engine.started, Engine.fails = [], False
    monkeypatch.setattr(engine_slots, "Supervisor", Engine)
    slots = EngineSlots(EngineLauncher([]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(slots.run)
        await anyio.wait_all_tasks_blocked()
        yield slots
        tasks.cancel_scope.cancel()


def request(epoch: int, model: str = "a", keep: tuple[int, ...] = (), memory: int = 0) -> pb.LoadStageRequest:
    return pb.LoadStageRequest(epoch=epoch, model=model, fingerprint=model, end_layer=4, keep=keep, memory_limit=memory)


async def load(slots: EngineSlots, asked: pb.LoadStageRequest) -> int:
    """Return the number of the engine that loaded the slice."""
    async with slots.load(asked) as slot:
        assert slots.loading
        slot.fingerprint = asked.fingerprint
    return slot.number


def held(slots: EngineSlots) -> dict[int, int]:
    """The epochs by the numbers of the engines that hold them."""
    return {slot.number: slot.held.epoch for slot in slots if slot.held}


async def test_a_slice_takes_the_place_of_all_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        assert await load(slots, request(1, "a")) == 0
        assert await load(slots, request(2, "b", keep=(1,))) == 1
        assert await load(slots, request(3, "c", keep=(1, 2))) == 2
        assert held(slots) == {0: 1, 1: 2, 2: 3}
        assert [slots.holder(epoch).number for epoch in (1, 2, 3, 99)] == [0, 1, 2, 0]
        assert slots.fingerprints() == {"a", "b", "c"}
        assert await load(slots, request(4, "b", keep=(1, 3))) == 1, "the engine that holds the same layers"
        assert held(slots) == {0: 1, 1: 4, 2: 3}
        assert await load(slots, request(5, "c")) == 2, "even where the others go"
        assert (held(slots), Engine.started[0].asked) == ({2: 5}, [1])
        assert await load(slots, request(6, "d")) == 0
        assert held(slots) == {0: 6}


async def test_what_is_kept_belongs_to_the_process_that_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that restarted loads one of its models: the others are its own from then on."""
    async with running(monkeypatch) as slots:
        for epoch, keep in ((1, ()), (2, (1,))):
            before = request(epoch, f"m{epoch}", keep=keep)
            before.instance = "before"
            await load(slots, before)
        now = request(3, "m2", keep=(1,))
        now.instance = "now"
        assert await load(slots, now) == 1
        assert [slot.held.instance for slot in slots if slot.held] == ["now", "now"]


async def test_an_older_load_and_one_without_room_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        await load(slots, request(5, "a", memory=600))
        with pytest.raises(StaleEpoch, match="asked to load epoch 4, but epoch 5 is loaded") as stale:
            await load(slots, request(4, "b"))
        assert stale.value.details["epoch"] == "5"
        with pytest.raises(DoesNotFit, match=r"b needs .* here, but other models hold .* of the ") as short:
            await load(slots, request(6, "b", keep=(5,), memory=500))
        assert short.value.details["missing_bytes"] == "100"
        assert await load(slots, request(4, "b", keep=(5,), memory=400)) == 1, "one that keeps the newer slice"
        assert held(slots) == {0: 5, 1: 4}


async def test_a_worker_holds_a_bounded_number_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        epochs = range(1, MAX_SLICES + 1)
        for epoch in epochs:
            await load(slots, request(epoch, f"m{epoch}", keep=tuple(range(1, epoch))))
        with pytest.raises(DoesNotFit, match="holds 8 slices of models already"):
            await load(slots, request(99, "one more", keep=tuple(epochs)))
        assert len(held(slots)) == MAX_SLICES == len(Engine.started)


async def test_an_unload_frees_what_it_does_not_keep_and_what_is_not_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        for epoch, keep in ((1, ()), (2, (1,)), (3, (1, 2))):
            await load(slots, request(epoch, f"m{epoch}", keep=keep))
        await slots.unload(pb.UnloadStageRequest(epoch=2, keep=[1]))
        assert held(slots) == {0: 1, 2: 3}
        await slots.unload(pb.UnloadStageRequest(epoch=9))
        assert (held(slots), len(list(slots)), Engine.started[0].asked) == ({}, 1, [9])


async def test_the_end_of_an_engine_takes_its_own_slice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        await load(slots, request(1, "a"))
        await load(slots, request(2, "b", keep=(1,)))
        slots.reset(99, "an engine of another epoch")
        slots.reset(2, "it hangs")
        await anyio.wait_all_tasks_blocked()
        assert held(slots) == {0: 1}
        await load(slots, request(3, "b", keep=(1,)))
        assert held(slots) == {0: 1, 1: 3}
        Engine.started[0].problem = "the engine crashed"
        reports = await slots.report()
        assert find_problem(reports) == "", "the other one works"
        assert [(s.epoch, s.data_port, s.problem) for s in describe_slices(reports)] == [
            (1, 100, "the engine crashed"),
            (3, 101, ""),
        ]
        Engine.started[2].problem = "it hangs, too"
        assert find_problem(await slots.report()) == "the engine crashed"


async def test_a_worker_whose_first_engine_ends_while_another_loads_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as slots:
        await load(slots, request(1, "a"))
        async with slots.load(request(2, "b", keep=(1,))):
            Engine.started[0].problem = "the engine crashed"
            assert find_problem(await slots.report()) == ""


async def test_a_load_beside_others_needs_no_engine_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        Engine.started[0].problem = "the engine crashed"
        await load(slots, request(2, "b", keep=(1,)))
        assert held(slots) == {1: 2}
        await load(slots, request(3, "a"))
        assert held(slots) == {0: 3}, "alone it needs the first engine, as ever"


async def test_an_engine_whose_load_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as slots:
        await load(slots, request(1, "a"))
        with pytest.raises(MacpipeError, match="no such model"):
            async with slots.load(request(2, "b", keep=(1,))):
                raise MacpipeError("no such model")
        Engine.fails = True
        with pytest.raises(WorkerLost, match="before it was ready"):
            await load(slots, request(3, "b", keep=(1,)))
        assert (held(slots), len(list(slots))) == ({0: 1}, 1)


async def test_the_rank_of_a_group_has_an_engine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX cannot leave a group, so that engine loads nothing else, and is killed: it may wait for the others."""
    async with running(monkeypatch) as slots:
        assert await load(slots, request(1, "a")) == 0
        rank = request(2, "a")
        rank.ranks = 2
        assert await load(slots, rank) == 1
        assert held(slots) == {1: 2}, "the first engine has freed its slice"
        again = request(3, "a")
        again.ranks = 2
        assert await load(slots, again) == 2
        assert (held(slots), Engine.started[1].killed) == ({2: 3}, True)
        assert await load(slots, request(4, "a")) == 0
        assert (held(slots), Engine.started[2].killed) == ({0: 4}, True)
