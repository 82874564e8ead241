"""A leader hands over, or steps down: it waits for its heir to be ready, says why in its log, and ends in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.api import coordinator_process as module
from cluster.api.coordinator_process import Leading
from cluster.coordinator.follower import Follower
from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.replicator import Replicator
from cluster.core.errors import MacpipeError, NotLeader, NotServing
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim, StandbyState
from cluster.standby.other_coordinators import OtherCoordinators

pytestmark = pytest.mark.anyio
ME, HEIR, OTHER = (CoordinatorName(f"mac-{i}", f"{i}", (f"mac-{i}:7700",)) for i in (1, 2, 3))


class Scene:
    """A leader without workers or models. ``happened`` has the steps of its end."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.others = OtherCoordinators(ME, self._ask)
        self.others.lead(3)
        self.replicator = Replicator(None, "copy")
        self.lead_change = LeadChange()
        deployments: Any = SimpleNamespace(values=tuple, lead_change=self.lead_change)
        coordinator: Any = SimpleNamespace(deployments=deployments, close=self._close)
        roster: Any = SimpleNamespace(terms=SimpleNamespace(give_back=self._give_back, number=3))
        upkeep: Any = SimpleNamespace(end=lambda: None)
        self.is_removed = False
        trust = SimpleNamespace(serial=7, revoked=lambda serial: self.is_removed)
        process: Any = SimpleNamespace(others=self.others, pass_on_http=self._pass_on, trust=trust)
        self.leading = Leading(process, coordinator, roster, self.replicator, upkeep, [])
        self.leading.loads.push_async_callback(self._end_loads)

    async def _ask(self, address: str, claim: LeaderClaim) -> LeaderClaim:
        raise AssertionError("nobody is asked")

    def _pass_on(self) -> None:
        assert self.others.claim.role is CoordinatorRole.STANDBY
        self.happened.append("new HTTP requests wait for the next leader")

    async def _end_loads(self) -> None:
        await asyncio.sleep(0)
        with suppress(MacpipeError):
            self.lead_change.require_going()
            self.happened.append("loads end before their requests know why")
        self.happened.append("loads ended")

    async def _give_back(self) -> None:
        await asyncio.sleep(0)
        self.happened.append("workers given back")

    async def _close(self, error: MacpipeError) -> None:
        await asyncio.sleep(0)
        self.happened.append(str(error))

    def follow(self, name: CoordinatorName, *, is_prepared: bool = False) -> Follower:
        follower = self.replicator.follow(name, name.name)
        follower.acknowledge(follower.newest)
        self.replicator.note_prepared(follower, is_prepared=is_prepared)
        return follower

    async def stop(self, problem: NotLeader | None = None) -> None:
        """Stop, with standbys that store all they are sent."""
        stopping = asyncio.create_task(self.leading.stop(problem))
        while not stopping.done():
            for follower in tuple(self.replicator._followers.values()):
                self.replicator.acknowledge(follower, follower.newest)
            await asyncio.sleep(0.01)
        await stopping


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_a_handover_waits_until_the_standby_has_read_the_model(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    caplog.set_level("INFO")
    follower = scene.follow(HEIR)
    asked = asyncio.create_task(scene.leading.hand_over("mac-2"))
    await until(lambda: "handover: waiting until the standby has read the model standby=mac-2" in caplog.text)
    assert not scene.leading.chosen
    scene.replicator.note_prepared(follower, is_prepared=True)
    assert await asked == "mac-2"
    assert [one.name for one in scene.leading.chosen] == ["mac-2"]


async def test_a_handover_goes_on_after_a_while_and_not_to_a_standby_that_has_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    follower = scene.follow(HEIR)
    leaving = asyncio.create_task(scene.leading.hand_over("mac-2"))
    await asyncio.sleep(0)
    scene.replicator.leave(follower)
    with pytest.raises(NotServing, match="no standby named mac-2 follows"):
        await leaving
    scene.follow(HEIR)
    monkeypatch.setattr(module, "PREPARED_S", 0.01)
    assert await scene.leading.hand_over("mac-2") == "mac-2"
    assert "handover: going on before the standby has read the model standby=mac-2" in caplog.text


async def test_a_leader_that_stops_waits_a_moment_and_hands_over_to_a_standby_that_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STOP_PREPARED_S", 60.0)
    scene = Scene()
    scene.follow(HEIR)
    scene.follow(OTHER, is_prepared=True)
    await scene.stop()
    why = "this coordinator stops, and mac-3 takes its place; send the request again, or resume the answer there"
    assert scene.happened == ["workers given back", "loads ended", why]
    assert scene.others.role is CoordinatorRole.STANDBY
    with pytest.raises(NotLeader, match="mac-3 takes its place; send the request again"):
        scene.lead_change.require_going()


async def test_a_leader_that_stops_goes_on_if_no_standby_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_PREPARED_S", 0.01)
    scene = Scene()
    scene.follow(HEIR)
    await scene.stop()
    assert scene.happened[-1].startswith("this coordinator stops, and mac-2 takes its place; send the request again")


async def test_new_http_requests_wait_for_the_next_leader_while_this_one_hands_over() -> None:
    scene = Scene()
    scene.follow(HEIR, is_prepared=True)
    await scene.leading.hand_over("")
    await scene.stop()
    assert scene.happened[:2] == ["new HTTP requests wait for the next leader", "workers given back"]


def said_of_stepping_down(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("leader: stepped down")]


async def test_a_higher_term_is_named_with_who_leads_by_it(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.others.hear(LeaderClaim(HEIR, CoordinatorRole.LEADER, 5, HEIR))
    await scene.stop()
    assert said_of_stepping_down(caplog) == [
        "leader: stepped down reason=higher term term=3 leader=mac-2 term_of_leader=5"
    ]


async def test_a_handover_names_the_standby_that_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    for name in (HEIR, OTHER):
        scene.follow(name, is_prepared=True)
    assert await scene.leading.hand_over("mac-3") == "mac-3"
    await scene.stop()
    assert said_of_stepping_down(caplog) == ["leader: stepped down reason=handover term=3 leader=mac-3"]


async def test_a_leader_that_stops_names_the_standby_that_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.follow(HEIR, is_prepared=True)
    await scene.stop()
    assert said_of_stepping_down(caplog) == ["leader: stepped down reason=stopped term=3 leader=mac-2"]


async def test_a_leader_that_was_removed_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.is_removed = True
    scene.follow(HEIR, is_prepared=True)
    await scene.stop()
    assert said_of_stepping_down(caplog) == ["leader: stepped down reason=removed term=3 leader=mac-2"]


async def test_why_it_must_not_lead_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    await Scene().stop(NotLeader("its journal lacks something"))
    assert said_of_stepping_down(caplog) == [
        "leader: stepped down reason=its journal lacks something term=3 leader=unknown"
    ]


async def test_a_handover_whose_standby_has_left_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.leading.chosen[:] = [StandbyState("mac-2")]
    await scene.stop()
    assert said_of_stepping_down(caplog) == ["leader: stepped down reason=handover term=3 leader=unknown"]


async def test_one_that_just_ends_steps_down_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    await scene.stop()
    assert not caplog.messages
    assert scene.happened == ["loads ended", "the coordinator is stopping"]
