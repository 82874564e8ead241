"""Loads take turns, and those that wait say for which model."""

from __future__ import annotations

import anyio
import pytest

from cluster.coordinator.load_turns import LoadTurns
from cluster.coordinator.reporter import LoadWatch

pytestmark = pytest.mark.anyio


async def test_loads_take_turns_and_say_for_whom_they_wait() -> None:
    turns, order = LoadTurns(), list[str]()
    watches = {name: LoadWatch(f"/models/{name}", "loading {}") for name in "abc"}
    may_end = {name: anyio.Event() for name in "abc"}
    ended = {name: anyio.Event() for name in "abc"}

    async def load(name: str) -> None:
        async with turns.take(watches[name]) as waited:
            order.append(f"{name} {waited}")
            await may_end[name].wait()
        ended[name].set()

    def sentences() -> list[str]:
        return [watch.sentence for watch in watches.values()]

    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(load, name)
            await anyio.wait_all_tasks_blocked()
        assert sentences() == ["loading a", *(f"loading {n}: waiting until a is loaded" for n in "bc")]
        may_end["a"].set()
        await ended["a"].wait()
        await anyio.wait_all_tasks_blocked()
        assert sentences()[1:] == ["loading b", "loading c: waiting until b is loaded"]
        for name in "bc":
            may_end[name].set()
    assert order == ["a False", "b True", "c True"]


async def test_a_load_that_is_given_up_lets_the_next_one_begin() -> None:
    turns = LoadTurns()
    first, waiting, last = (LoadWatch(name, "loading {}") for name in ("a", "b", "c"))
    async with turns.take(first):
        with anyio.move_on_after(0.01) as scope:
            async with turns.take(waiting):
                raise AssertionError("two turns at once")
        assert scope.cancelled_caught
    with pytest.raises(ValueError, match="damaged"):
        async with turns.take(waiting):
            raise ValueError("damaged")
    async with turns.take(last) as waited:
        assert not waited


async def test_a_load_that_comes_as_the_turn_passes_on_waits_like_the_others() -> None:
    turns, order = LoadTurns(), list[str]()

    async def load(name: str) -> None:
        async with turns.take(LoadWatch(name, "loading {}")) as waited:
            order.append(f"{name} {waited}")

    async with anyio.create_task_group() as tasks:
        async with turns.take(LoadWatch("a", "loading {}")):
            tasks.start_soon(load, "b")
            await anyio.wait_all_tasks_blocked()
        await load("c")
    assert order == ["b True", "c True"]
