"""A new leader that cannot load what was served tries again: soon, then less often, unless somebody else leads."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cluster.api import daemon
from cluster.core.errors import MacpipeError, NoWorkers
from cluster.core.limits import HEARTBEAT_S, RETURN_S


class Scene:
    """A coordinator whose first ``failures`` loads fail, and ``others``, of whom nobody leads before so many asked.

    ``newer``: whoever leads does so by a higher term than this coordinator.
    """

    def __init__(self, failures: int, led_after: int = 1000, *, newer: bool = True) -> None:
        self.failures, self.led_after, self.newer = failures, led_after, newer
        self.loads = self.asked = 0
        self.addresses = ("mac-2:7700",)
        self.others = self
        self.told = list[str]()

    async def load(self, order: object, *, again: bool) -> None:
        await anyio.lowlevel.checkpoint()
        self.loads += 1
        if self.loads <= self.failures:
            raise NoWorkers("too few")

    async def find_leader(self, addresses: Iterable[str]) -> str | None:
        self.asked += 1
        return "mac-2" if self.asked > self.led_after else None

    @property
    def is_superseded(self) -> bool:
        return self.newer and self.asked > self.led_after

    def problem(self, sentence: str) -> None:
        self.told.append(sentence)

    async def play(self, *, taken: bool) -> None:
        settings: Any = SimpleNamespace(order=SimpleNamespace(model="faq"))
        succession: Any = SimpleNamespace(had_loaded_default=True) if taken else None
        me: Any = self
        await daemon._load_first(me, settings, me, me, succession)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time."""
    found = list[float]()

    async def sleep(seconds: float) -> None:
        found.append(seconds)
        await sleep_now(0)

    sleep_now = anyio.sleep
    monkeypatch.setattr(daemon.anyio, "sleep", sleep)
    return found


@pytest.mark.anyio
async def test_a_new_leader_tries_again_soon_and_then_less_often(pauses: list[float]) -> None:
    scene = Scene(failures=6)
    await scene.play(taken=True)
    tries = [pause_s for pause_s in pauses if pause_s]
    assert tries[0] == HEARTBEAT_S
    assert tries == sorted(tries)
    assert tries[-1] == RETURN_S
    assert scene.told[0] == "cannot go on with faq yet: too few"
    assert (scene.loads, len(scene.told)) == (7, 6)


@pytest.mark.anyio
async def test_it_waits_to_be_replaced_if_somebody_else_leads() -> None:
    scene = Scene(failures=9, led_after=0)
    with anyio.move_on_after(0.05) as waiting:
        await scene.play(taken=True)
    assert waiting.cancelled_caught
    assert scene.loads == 1


@pytest.mark.anyio
async def test_one_that_still_leads_by_a_lower_term_is_not_waited_for(pauses: list[float]) -> None:
    scene = Scene(failures=2, led_after=0, newer=False)
    with anyio.fail_after(5):
        await scene.play(taken=True)
    assert (scene.loads, len(scene.told)) == (3, 2)


@pytest.mark.anyio
async def test_who_took_nobodys_place_fails() -> None:
    with pytest.raises(MacpipeError, match="too few"):
        await Scene(failures=1).play(taken=False)
