"""A leader that steps down says so in its log: why, by which term it led, and who leads now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.api.coordinator_process import Leading
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.term_holder import TermHolder
from cluster.core.errors import MacpipeError, NotLeader, Unreachable
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim, StandbyState
from cluster.membership.leadership import Leadership
from cluster.membership.terms import Process, Term
from cluster.standby.other_coordinators import OtherCoordinators

pytestmark = pytest.mark.anyio
ME = CoordinatorName("mac-1", "a", ("mac-1:7700",))
OTHER = CoordinatorName("mac-2", "b", ("mac-2:7700",))
THIRD = CoordinatorName("mac-3", "c", ("mac-3:7700",))


async def silent(address: str, claim: LeaderClaim) -> LeaderClaim:
    raise Unreachable("nobody answers")


@dataclass
class Coordinator:
    """What a leader stops: no model is served."""

    deployments: dict[str, object] = field(default_factory=dict)
    closed: list[MacpipeError | None] = field(default_factory=list)

    async def close(self, error: MacpipeError | None = None) -> None:
        self.closed.append(error)


class Scene:
    """A leader by term 3, without workers."""

    def __init__(self) -> None:
        process = Process("id", "a")
        self.terms = TermHolder(process)
        self.terms.begin(Leadership(Term(3, process), {}, bool, lambda: 0.0), [])
        self.others = OtherCoordinators(ME, silent)
        self.others.lead(3)
        self.replicator = Replicator(None, "copy")
        self.coordinator = Coordinator()
        parts: Any = (self, self.coordinator, self, self.replicator, self)
        self.leading = Leading(*parts, [])

    def end(self) -> None:
        """End what a leader does beside serving."""


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_higher_term_is_named_with_who_leads_by_it(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.others.hear(LeaderClaim(OTHER, CoordinatorRole.LEADER, 5, OTHER))
    await scene.leading.stop()
    assert caplog.messages == ["leader: stepped down reason=higher term term=3 leader=mac-2 term_of_leader=5"]
    assert isinstance(scene.coordinator.closed[0], NotLeader)


async def test_a_handover_names_the_standby_that_was_chosen(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    for name in (OTHER, THIRD):
        scene.replicator.follow(name, name.instance)
    assert await scene.leading.hand_over("mac-3") == "mac-3"
    await scene.leading.stop()
    assert caplog.messages == ["leader: stepped down reason=handover term=3 leader=mac-3"]


async def test_a_leader_that_stops_names_the_standby_that_takes_over(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.replicator.follow(OTHER, "copy-2")
    await scene.leading.stop()
    assert caplog.messages == ["leader: stepped down reason=stopped term=3 leader=mac-2"]


async def test_why_it_must_not_lead_is_the_reason(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    await scene.leading.stop(NotLeader("its journal lacks something"))
    assert caplog.messages == ["leader: stepped down reason=its journal lacks something term=3 leader=unknown"]


async def test_a_handover_whose_standby_has_left_is_told_too(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.leading.chosen[:] = [StandbyState("mac-2")]
    await scene.leading.stop()
    assert caplog.messages == ["leader: stepped down reason=handover term=3 leader=unknown"]


async def test_one_that_just_ends_steps_down_for_nobody(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    await scene.leading.stop()
    assert not caplog.messages
    assert scene.coordinator.closed == [None]
