"""What a drain does if the layers fit on no other Mac."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.service import ModelService
from cluster.core.errors import DoesNotFit, MacpipeError
from cluster.core.worker import WorkerInfo
from coordinator.test_planner import worker

pytestmark = pytest.mark.anyio


class DrainedService(ModelService):
    """A service whose layers can move once ``idle`` other models have left memory, or never."""

    def __init__(self, idle: int, needed: int) -> None:
        self.idle, self.needed = idle, needed
        self.released, self.refusals = list[str](), list[MacpipeError]()
        self._deps: Any = SimpleNamespace(take_back=self.take_back)
        self._context: Any = None
        self._epoch: Any = "the old ring"

    async def take_back(self) -> bool:
        self.idle -= 1
        self.needed -= 1
        return self.idle >= 0

    async def _carry_out(self, move: Any, chosen: Any = None) -> None:
        if self.needed > 0:
            raise DoesNotFit("it lacks 9 bytes")

    def _stage_workers(self) -> set[str]:
        return {"bob"} if self.needed <= 0 else {"ada"}

    async def _release(self, leaver: WorkerInfo) -> None:
        self.released.append(leaver.name)

    async def _cannot_leave(self, leaver: WorkerInfo, why: MacpipeError) -> None:
        self.refusals.append(why)


@pytest.mark.parametrize(("idle", "released"), [(3, ["ada"]), (2, ["ada"]), (1, [])])
async def test_others_that_are_idle_make_room_for_the_layers_of_a_drained_worker(
    idle: int, released: list[str]
) -> None:
    service = DrainedService(idle, needed=2)
    await service._move_from(worker("ada", 1000))
    assert service.released == released
    assert [type(why) for why in service.refusals] == ([] if released else [DoesNotFit])
    assert service.idle == max(idle - 2, -1), "no more leave than have to"
