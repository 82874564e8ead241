"""An inquest always ends, tells everybody once, and tells latecomers too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.coordinator import diagnosis
from cluster.coordinator.diagnosis import Inquest, diagnose
from cluster.errors import MacpipeError, WorkerLost
from cluster.types import LayerRange, ModelRef, PlannedStage, StageSpec, WorkerFacts

CAUSE = WorkerLost("b: the data stream broke")


def stage(index: int, worker: str) -> PlannedStage:
    return PlannedStage(StageSpec(7, index, 2, ModelRef("m", "", ""), LayerRange(index, index + 1), 64), worker, 1, 1)


class FakeControl:
    """A worker that answers with an epoch, a problem, or not at all."""

    def __init__(self, epoch: int = 7, problem: str = "", gone: str = "") -> None:
        self._facts = (WorkerFacts("i", "n", "", "", "", "", "", "", "", 0, 0, epoch=epoch, model="m"), problem)
        self._gone = gone

    async def describe(self, timeout_s: float) -> tuple[WorkerFacts, str]:
        if self._gone:
            raise WorkerLost(self._gone)
        return self._facts


STAGES = (stage(0, "a"), stage(1, "b"))


def found(*controls: Any) -> MacpipeError:
    return asyncio.run(diagnose(CAUSE, STAGES, controls))


def test_the_guilty_are_named_and_not_their_neighbours() -> None:
    assert found(FakeControl(), FakeControl()) is CAUSE
    assert found(FakeControl(gone="worker a at x does not answer"), FakeControl()).details == {"worker": "a"}
    assert "engine was ended" in found(FakeControl(), FakeControl(problem="the engine was ended by SIGKILL")).sentence
    assert "worker b lost layers 1-1" in found(FakeControl(), FakeControl(epoch=0)).sentence
    assert "another coordinator loaded m there" in found(FakeControl(epoch=8), FakeControl()).sentence


def test_everybody_is_told_once_and_latecomers_at_once() -> None:
    async def body() -> None:
        controls: Any = (FakeControl(gone="worker a is gone"), FakeControl())
        inquest, told = Inquest(STAGES, controls), []
        inquest.tell(told.append)
        for _ in range(3):
            inquest.begin(CAUSE)
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.01)
        inquest.tell(told.append)
        assert [e.sentence for e in told] == ["worker a is gone"] * 2
        assert inquest.error is told[0]

    asyncio.run(body())


def test_a_looking_that_fails_still_ends_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> MacpipeError:
        raise ValueError("a bug")

    async def body() -> None:
        inquest, told = Inquest(STAGES, ()), []
        inquest.tell(told.append)
        inquest.begin(CAUSE)
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.01)
        assert told == [CAUSE]
        with pytest.raises(ValueError, match="a bug"):
            await inquest.ended()

    monkeypatch.setattr(diagnosis, "diagnose", broken)
    asyncio.run(body())
