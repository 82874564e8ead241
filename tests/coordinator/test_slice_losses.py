"""A worker that loses its slice again and again is avoided, and tried less and less often."""

from __future__ import annotations

from cluster.coordinator.slice_losses import SliceLosses
from cluster.core.limits import CRASHES_S, ENGINE_BACKOFF_S, ENGINE_CRASHES


def test_a_worker_that_loses_its_slice_often_is_avoided_until_that_is_long_ago() -> None:
    now = [1000.0]
    losses = SliceLosses(lambda: now[0])
    for _ in range(ENGINE_CRASHES - 1):
        losses.add("ada")
    assert not losses.crashing()
    losses.add("ada")
    losses.add("bob")
    assert losses.crashing() == {"ada"}
    now[0] += CRASHES_S + 1
    assert not losses.crashing()
    assert losses.pause_s("ada") == 0.0


def test_the_pauses_are_those_of_an_engine_that_keeps_dying() -> None:
    now = [1000.0]
    losses = SliceLosses(lambda: now[0])
    assert losses.pause_s("ada") == 0.0
    for pause_s in (*ENGINE_BACKOFF_S, ENGINE_BACKOFF_S[-1]):
        losses.add("ada")
        assert losses.pause_s("ada") == pause_s
    now[0] += ENGINE_BACKOFF_S[-1] - 1
    assert losses.pause_s("ada") == 1.0
