"""The metrics of guesses: counters by source, and by the stage whose compute wrong ones wasted; and of who leads."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.metrics import Metrics, ProcessMetrics, standby_exposition
from cluster.core.cluster_state import DeploymentState, GuessCounts, ReplicaState, RequestState, ServingState
from cluster.core.leadership import (
    CoordinatorName,
    CoordinatorRole,
    FollowingState,
    LeadershipState,
    StandbyState,
)
from coordinator.test_snapshot import LOOP, PLAN


def exposition(**more: object) -> list[str]:
    loop = replace(LOOP, **more)
    return Metrics().exposition(ServingState.SERVING, PLAN, loop).decode().splitlines()


def test_guesses_are_counted_by_source_and_waste_by_stage() -> None:
    counts = (GuessCounts("ngram", 9, 5, 2, 4), GuessCounts("prediction", 7, 7, 0))
    lines = exposition(guesses=counts, wasted_s=(0.5,))
    assert 'macpipe_guessed_tokens_total{source="ngram"} 9.0' in lines
    assert 'macpipe_accepted_tokens_total{source="prediction"} 7.0' in lines
    assert 'macpipe_voided_tokens_total{source="ngram"} 2.0' in lines
    assert 'macpipe_guessed_rows_total{source="ngram"} 4.0' in lines
    assert 'macpipe_wasted_compute_seconds_total{stage="0",worker="ada"} 0.5' in lines
    assert 'macpipe_wasted_compute_seconds_total{stage="1",worker="bob"} 0.0' in lines


def test_a_group_is_one_stage() -> None:
    first, last = PLAN.stages
    ranks = [replace(first, spec=replace(first.spec, rank=rank, ranks=2)) for rank in range(2)]
    plan = replace(PLAN, stages=(ranks[0], replace(ranks[1], worker="cyd"), last))
    lines = Metrics().exposition(ServingState.SERVING, plan, LOOP).decode().splitlines()
    shown = [line for line in lines if line.startswith("macpipe_stage_workers")]
    assert shown == [
        'macpipe_stage_workers{stage="0",worker="ada"} 2.0',
        'macpipe_stage_workers{stage="1",worker="bob"} 1.0',
    ]


def test_without_guesses_no_source_is_named() -> None:
    assert not [line for line in exposition() if "source=" in line]
    assert "macpipe_guess_window 1.0" in exposition()


def test_the_widest_window_and_missing_memory_for_marks_are_shown() -> None:
    requests = tuple(replace(LOOP.requests[0], window=window) for window in (1, 3, 2))
    lines = exposition(requests=requests, guesses_without_room=4)
    assert "macpipe_guess_window 3.0" in lines
    assert "macpipe_guesses_without_room_total 4.0" in lines


def test_several_models_are_told_apart_by_a_label() -> None:
    request = replace(LOOP.requests[0], state=RequestState.DECODE)
    replica = ReplicaState(ServingState.SERVING, requests=(request, request), prefixes=3)
    small = DeploymentState("small", "org/small", ServingState.SERVING, idle_seconds=2.5, replicas=(replica, replica))
    models = (small, DeploymentState("other", "org/other", ServingState.IDLE))
    text = Metrics().exposition(ServingState.SERVING, PLAN, LOOP, deployments=models).decode()
    for line in (
        'macpipe_model_loaded{model="small"} 1.0',
        'macpipe_model_loaded{model="other"} 0.0',
        'macpipe_model_replicas{model="small"} 2.0',
        'macpipe_model_idle_seconds{model="small"} 2.5',
        'macpipe_model_kept_prefixes{model="small"} 6.0',
        'macpipe_model_requests_live{model="small",phase="decode"} 4.0',
        'macpipe_model_requests_live{model="other",phase="queued"} 0.0',
    ):
        assert line in text.splitlines()
    assert not [line for line in exposition() if "macpipe_model" in line]


def test_a_leader_shows_its_term_and_how_far_its_standbys_are() -> None:
    assert not [line for line in exposition() if "leader" in line]
    standbys = (StandbyState("mac-2", in_sync=True), StandbyState("mac-3", behind=7, away=True))
    state = LeadershipState(CoordinatorRole.LEADER, 4, standbys=standbys)
    lines = Metrics().exposition(ServingState.SERVING, None, None, leadership=state).decode().splitlines()
    assert {"macpipe_leader 1.0", "macpipe_leader_term 4.0"} <= set(lines)
    assert 'macpipe_standby_in_sync{standby="mac-2"} 1.0' in lines
    assert 'macpipe_standby_in_sync{standby="mac-3"} 0.0' in lines
    assert 'macpipe_standby_behind{standby="mac-3"} 7.0' in lines
    assert {'macpipe_standby_follows{standby="mac-2"} 1.0', 'macpipe_standby_follows{standby="mac-3"} 0.0'} <= set(
        lines
    )


LEADER = CoordinatorName("mac-1", "a")


def values(text: bytes) -> dict[str, float]:
    """The value of each series without labels."""
    families = text_string_to_metric_families(text.decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_a_leader_names_itself_and_since_when_the_same_until_the_next_term(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, now = Metrics(), 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)

    def page(term: int, seconds: float) -> bytes:
        state = LeadershipState(CoordinatorRole.LEADER, term, LEADER, since_seconds=seconds)
        return metrics.exposition(ServingState.SERVING, None, None, leadership=state)

    assert b'macpipe_leader_info{leader="mac-1"} 1.0' in page(4, 60.0)
    assert values(page(4, 60.0))["macpipe_leader_since_timestamp_seconds"] == 999_940.0
    assert values(page(4, 61.5))["macpipe_leader_since_timestamp_seconds"] == 999_940.0
    assert values(page(5, 0.25))["macpipe_leader_since_timestamp_seconds"] == 999_999.75


def test_a_standby_tells_of_itself_alone() -> None:
    lines = standby_exposition(FollowingState(4, LEADER, follows=True, in_sync=True)).decode().splitlines()
    assert {
        "macpipe_leader 0.0",
        "macpipe_leader_term 4.0",
        'macpipe_leader_info{leader="mac-1"} 1.0',
        "macpipe_follows_leader 1.0",
        "macpipe_in_sync_with_leader 1.0",
    } < set(lines)
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    of_lead = {"macpipe_leader", "macpipe_leader_term", "macpipe_leader_info"}
    assert names == {*of_lead, "macpipe_info", "macpipe_follows_leader", "macpipe_in_sync_with_leader"}
    alone = standby_exposition(FollowingState(4))
    assert values(alone)["macpipe_follows_leader"] == values(alone)["macpipe_in_sync_with_leader"] == 0.0
    assert b"macpipe_leader_info{" not in alone


def test_the_process_tells_its_start_its_processor_time_and_its_memory() -> None:
    found = values(ProcessMetrics(started_at=5.5).exposition())
    assert found["process_start_time_seconds"] == 5.5
    assert 0 < found["process_cpu_seconds_total"] <= time.process_time()
    assert found["process_resident_memory_bytes"] > 2**20
