"""How a recovery waits if there is no plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator import recovery as module
from cluster.coordinator.recovery import MAX_PAUSES, Recovery
from cluster.coordinator.slice_losses import SliceLosses
from cluster.core.errors import NoPlan, WorkerLost
from cluster.core.limits import ENGINE_CRASHES

pytestmark = pytest.mark.anyio


def create_recovery(without_plan: int, retire: Callable[[], bool] = lambda: False) -> tuple[Recovery, list[int]]:
    """Return a recovery whose first tries find no plan, and the tries so far."""
    tries = list[int]()

    class ScriptedRecovery(Recovery):
        async def _find_cause(self) -> None: ...

        async def _try_once(self) -> Any:
            tries.append(self.attempts)
            if self.attempts <= without_plan:
                raise NoPlan("it does not fit")
            return "the next epoch"

    async def nothing() -> bool:
        return False

    loop = SimpleNamespace(hold=lambda: None, refuse=lambda error: None)
    context: Any = SimpleNamespace(
        loop=loop, failures=asyncio.Queue(), deps=SimpleNamespace(take_back=nothing), losses=SliceLosses()
    )
    epoch: Any = SimpleNamespace(plan=SimpleNamespace(stages=(), epoch=1), controls=())
    return ScriptedRecovery(context, epoch, WorkerLost("a is gone"), lambda sentence: None, retire), tries


async def test_a_recovery_without_a_plan_tries_again_once_a_worker_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECOVERY_PAUSE_S", 1000.0)
    recovery, tries = create_recovery(without_plan=1)
    running = asyncio.create_task(recovery.run())
    while not tries:
        await asyncio.sleep(0)
    recovery.notice_change()
    assert await running == "the next epoch"
    assert (tries, recovery.pause_s) == ([1, 2], 1000.0)


async def test_a_recovery_without_a_plan_pauses_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECOVERY_PAUSE_S", 0.001)
    recovery, tries = create_recovery(without_plan=6)
    assert await recovery.run() == "the next epoch"
    assert len(tries) == 7
    assert recovery.pause_s == pytest.approx(MAX_PAUSES * 0.001)


async def test_a_copy_without_a_plan_is_given_up_unless_its_engine_keeps_crashing() -> None:
    asked = list[bool]()
    recovery, _ = create_recovery(without_plan=1, retire=lambda: not asked.append(True))
    running = asyncio.create_task(recovery.run())
    while not asked:
        await asyncio.sleep(0)
    assert recovery.doing == "other copies of the model go on without it"
    running.cancel()
    asked.clear()
    recovery, tries = create_recovery(without_plan=1, retire=lambda: not asked.append(True))
    for _ in range(ENGINE_CRASHES):
        recovery._context.losses.add("a")
    assert await recovery.run() == "the next epoch"
    assert (asked, tries) == ([], [1, 2])
