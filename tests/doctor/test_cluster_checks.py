"""What ``doctor --cluster`` finds in the state of a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from client.scripted import cluster_reply
from cluster.codec.cluster_state import decode_cluster_state
from cluster.core.cluster_state import ClusterState
from cluster.core.examination import Finding, Severity
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeadershipState, StandbyState
from cluster.doctor.cluster_checks import ANSWER_CHECKS, CLUSTER_CHECKS, report_not_examined, report_unreachable
from cluster.doctor.finding import all_findings, has_problem, run_checks


def state(**second: Any) -> ClusterState:
    """Return a cluster of two workers with which nothing is wrong, the second changed."""
    plain = decode_cluster_state(cluster_reply())
    workers = tuple(replace(one, reachable=True, problem="", macos_version="26.5") for one in plain.workers)
    return replace(plain, workers=(workers[0], replace(workers[1], **second)), problem="", warnings=())


def findings(found: ClusterState) -> list[Finding]:
    return list(all_findings(run_checks(ANSWER_CHECKS | CLUSTER_CHECKS, found)))


def test_nothing_is_found_in_a_healthy_cluster() -> None:
    assert findings(state()) == []


@pytest.mark.parametrize(
    ("changed", "severity", "mac", "what"),
    [
        ({"version": "0.0.9"}, Severity.PROBLEM, "cluster", "macpipe differs: 0.0.9 on mac-b; 0.1.0 on mac-a"),
        ({"mlx_version": "0.31.0"}, Severity.WARNING, "cluster", "MLX differs: 0.31.0 on mac-b; 0.32.4 on mac-a"),
        ({"macos_version": "15.6"}, Severity.NOTE, "cluster", "macOS differs: 15.6 on mac-b; 26.5 on mac-a"),
        ({"clock_ahead_seconds": -600.0}, Severity.PROBLEM, "mac-b", "its clock is 10 min behind the coordinator's"),
        ({"clock_ahead_seconds": 600.0}, Severity.PROBLEM, "mac-b", "its clock is 10 min ahead of the coordinator's"),
        ({"reachable": False, "silent_seconds": 30.0}, Severity.PROBLEM, "mac-b", "it has not answered for 30 s"),
        ({"problem": "its engine ended"}, Severity.PROBLEM, "mac-b", "its engine ended"),
        ({"memory_pressure": "critical"}, Severity.PROBLEM, "mac-b", "memory pressure is critical"),
        ({"memory_pressure": "warning"}, Severity.WARNING, "mac-b", "memory pressure is warning"),
        ({"lag_seconds": 1.5}, Severity.WARNING, "mac-b", "it responds up to 1.5 s late"),
    ],
)
def test_finds(changed: dict[str, Any], severity: Severity, mac: str, what: str) -> None:
    (found,) = findings(state(**changed))
    assert (found.severity, found.mac, found.what) == (severity, mac, what)
    assert found.why.endswith(".")
    assert found.remedy


def test_a_worker_without_a_system_version_is_no_difference() -> None:
    """A worker on Linux names no macOS."""
    assert findings(state(macos_version="")) == []


def test_problems_of_the_service() -> None:
    troubled = replace(state(), problem="mac-b is lost", warnings=("the journal is off",), lag_seconds=2.0)
    assert [one.what for one in findings(troubled)] == [
        "mac-b is lost",
        "the journal is off",
        "the coordinator's Mac responds up to 2.0 s late",
    ]


def test_an_unreachable_coordinator_is_a_problem() -> None:
    assert has_problem((report_unreachable("no coordinator answers"),))


def test_macs_that_were_not_examined_are_a_warning() -> None:
    (found,) = report_not_examined("ExamineCluster is for admin, and mac-2 is a worker").findings or ()
    assert found.severity is Severity.WARNING
    assert "mac-2 is a worker" in found.what
    assert "on the coordinator's Mac" in found.remedy


def test_standbys_that_do_not_follow_and_a_second_leader_are_named() -> None:
    away = StandbyState("mac-2", problem="it does not answer", away=True)
    standbys = (away, StandbyState("mac-3", problem="7 updates behind"))
    led = LeadershipState(CoordinatorRole.LEADER, 4, standbys=standbys, others=(CoordinatorName("mac-4", "i"),))
    found = findings(replace(state(), leadership=led))
    assert [(one.mac, one.what) for one in found] == [("mac-2", "it does not answer"), ("mac-4", "it leads too")]
