"""A better link between two stages is noticed once it is much better than the one in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cluster.coordinator import link_upkeep
from cluster.coordinator.link_upkeep import LinkUpkeep, find_better_link
from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import RosterEntry
from cluster.core.errors import WorkerLost
from cluster.core.plan import Link, Route

WIFI, CABLE = Link(0.003, 8e7), Link(0.0004, 3e9)


class Control:
    """The client of a worker whose best link is known."""

    def __init__(self, best: Link | None) -> None:
        self.best, self.asked = best, 0

    async def measure_link(self, source: object) -> Link:
        self.asked += 1
        if self.best is None:
            raise WorkerLost("no answer")
        return self.best


def epoch_of(used: Link | None, control: Control) -> Any:
    stages = (RingStage("mac-1", "h:1", Route.RELAY), RingStage("mac-2", "h:2", Route.DIRECT, link=used))
    return SimpleNamespace(stages=stages, controls=(Control(None), control), plan=SimpleNamespace(is_grouped=False))


async def found(used: Link | None, best: Link | None, hosts: tuple[str, ...] = ("10.0.0.1",)) -> tuple[str, int]:
    control = Control(best)
    workers: Any = {"mac-1": SimpleNamespace(data_hosts=hosts)}
    return await find_better_link(epoch_of(used, control), workers), control.asked


@pytest.mark.anyio
async def test_a_much_better_link_is_found() -> None:
    assert await found(WIFI, CABLE) == ("a faster network between mac-1 and mac-2 was found", 1)


@pytest.mark.anyio
async def test_nothing_is_changed_for_a_little_or_for_nothing_known() -> None:
    assert await found(CABLE, Link(CABLE.round_trip_s / 1.2, CABLE.bandwidth * 1.2)) == ("", 1)
    assert await found(CABLE, WIFI) == ("", 1)
    assert await found(WIFI, None) == ("", 1)


@pytest.mark.anyio
async def test_nothing_is_measured_where_there_is_no_choice() -> None:
    assert await found(WIFI, CABLE, hosts=()) == ("", 0)
    assert await found(None, CABLE) == ("", 0)


@pytest.mark.anyio
async def test_what_was_found_is_for_its_epoch_and_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_upkeep, "LINKS_S", 0.0)
    control = Control(CABLE)
    epoch, busy = epoch_of(WIFI, control), [True, True]

    async def is_idle() -> bool:
        assert not control.asked, "nothing is measured beside requests"
        return not (busy and busy.pop())

    info: Any = SimpleNamespace(name="mac-1", data_hosts=("10.0.0.1",))
    upkeep = LinkUpkeep(lambda: epoch, is_idle, lambda: [RosterEntry(info)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upkeep.run)
        while not upkeep.has_better(epoch):
            await checkpoint()
        tasks.cancel_scope.cancel()
    assert (busy, control.asked) == ([], 1)
    assert not upkeep.has_better(epoch_of(WIFI, control)), "another epoch may use it"
    assert upkeep.take() == "a faster network between mac-1 and mac-2 was found"
    assert not upkeep.has_better(epoch)
