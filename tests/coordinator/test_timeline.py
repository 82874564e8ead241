"""The last events of a cluster: their age, how long they took, and that they are bounded."""

from __future__ import annotations

from cluster.coordinator.timeline import MAX_EVENTS, Timeline
from cluster.core.cluster_state import ClusterEvent, EventKind
from cluster.core.limits import MAX_SENTENCE_CHARS


def test_an_event_has_its_age_and_how_long_it_took() -> None:
    now = 10.0
    timeline = Timeline(lambda: now)
    timeline.add(EventKind.RETURN, "worker ada is back", "ada")
    now = 15.0
    timeline.add(EventKind.RECOVERY, "worker bob is gone", "bob", began=12.0)
    now = 16.0
    assert timeline.recoveries == 1
    assert timeline.describe() == (
        ClusterEvent(EventKind.RETURN, 6.0, 0.0, "ada", "worker ada is back"),
        ClusterEvent(EventKind.RECOVERY, 1.0, 3.0, "bob", "worker bob is gone"),
    )


def test_old_events_are_forgotten_and_long_sentences_cut() -> None:
    timeline = Timeline()
    for i in range(MAX_EVENTS + 2):
        timeline.add(EventKind.MOVE, f"{i} " + "x" * MAX_SENTENCE_CHARS)
    events = timeline.describe()
    assert timeline.recoveries == 0
    assert (len(events), events[0].sentence[:2]) == (MAX_EVENTS, "2 ")
    assert {len(event.sentence) for event in events} == {MAX_SENTENCE_CHARS}


def test_a_worker_that_is_back_is_told_once_a_loss() -> None:
    timeline = Timeline(lambda: 70.0)
    assert timeline.add_return("ada", 10.0) == "worker ada is back after 60 s"
    assert timeline.add_return("ada", 10.0) == ""
    assert timeline.add_return("ada", 65.0) == "worker ada is back after 5 s"
    assert [(event.kind, event.duration_seconds) for event in timeline.describe()] == [
        ("return", 60.0),
        ("return", 5.0),
    ]
