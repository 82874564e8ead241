"""Checks of a whole cluster, from its state as the coordinator reports it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Final

from cluster.core.cluster_state import ClusterState
from cluster.core.examination import CheckResult, Finding, Severity
from cluster.core.text import duration_in_words
from cluster.core.worker import WorkerState
from cluster.doctor.finding import Check
from cluster.security.limits import CLOCKS_DIFFER_S


def check_answers(state: ClusterState) -> list[Finding]:
    """Find workers that do not answer or cannot be used."""
    return [
        Finding(
            Severity.PROBLEM,
            worker.problem or f"it has not answered for {duration_in_words(worker.silent_seconds)}",
            "It gets no layers until it answers again.",
            "macpipe doctor, on that Mac",
            worker.name,
        )
        for worker in state.workers
        if worker.problem or not worker.reachable
    ]


def check_clocks(state: ClusterState) -> list[Finding]:
    """Find workers whose clock differs from the coordinator's."""
    return [
        Finding(
            Severity.PROBLEM,
            f"its clock is {duration_in_words(abs(worker.clock_ahead_seconds))}"
            f" {'ahead of' if worker.clock_ahead_seconds > 0 else 'behind'} the coordinator's",
            "Certificates are valid from one time to another; with a wrong clock they are refused.",
            "sudo sntp -sS time.apple.com, on that Mac",
            worker.name,
        )
        for worker in state.workers
        if abs(worker.clock_ahead_seconds) > CLOCKS_DIFFER_S
    ]


def check_versions(state: ClusterState) -> list[Finding]:
    """Find versions of macpipe, MLX and macOS that differ between the workers."""
    return [
        finding
        for name, severity, why, remedy, version in _VERSIONS
        for finding in _compare(state.workers, name, severity, why, remedy, version)
    ]


def _compare(
    workers: tuple[WorkerState, ...],
    name: str,
    severity: Severity,
    why: str,
    remedy: str,
    version: Callable[[WorkerState], str],
) -> list[Finding]:
    having: dict[str, list[str]] = defaultdict(list)
    for worker in workers:
        if found := version(worker):
            having[found].append(worker.name)
    if len(having) < 2:
        return []
    listed = "; ".join(f"{found} on {', '.join(names)}" for found, names in sorted(having.items()))
    return [Finding(severity, f"{name} differs: {listed}", why, remedy, "cluster")]


_VERSIONS: Final = (
    (
        "macpipe",
        Severity.PROBLEM,
        "Macs of different versions refuse each other's frames.",
        "install the same version on all: python -m pip install --upgrade macpipe",
        lambda worker: worker.version,
    ),
    (
        "MLX",
        Severity.WARNING,
        "Different kernels round differently, so an answer depends on which Mac holds a layer.",
        "install the same version on all: python -m pip install --upgrade mlx mlx-lm",
        lambda worker: worker.mlx_version,
    ),
    (
        "macOS",
        Severity.NOTE,
        "Speeds and kernels differ between releases; RDMA needs the same build on all.",
        "softwareupdate --list",
        lambda worker: worker.macos_version,
    ),
)


def check_loads(state: ClusterState) -> list[Finding]:
    """Find machines that are short of memory or of processor time."""
    found = []
    for worker in state.workers:
        if worker.memory_pressure in ("warning", "critical"):
            why = "macOS compresses and swaps memory, so every token waits for this Mac."
            what = f"memory pressure is {worker.memory_pressure}"
            severity = Severity.PROBLEM if worker.memory_pressure == "critical" else Severity.WARNING
            found.append(Finding(severity, what, why, "end other programs on that Mac", worker.name))
        if worker.lag_seconds:
            what = f"it responds up to {worker.lag_seconds:.1f} s late"
            why = "The Mac is overloaded, and every token waits for it."
            found.append(Finding(Severity.WARNING, what, why, f"macpipe drain {worker.name}", worker.name))
    return found


def check_service(state: ClusterState) -> list[Finding]:
    """Find problems of the service as a whole."""
    found = [
        Finding(Severity.WARNING, text, "The coordinator reports it.", "macpipe status") for text in state.warnings
    ]
    if state.problem:
        found.append(Finding(Severity.PROBLEM, state.problem, "Requests wait or are refused.", "macpipe status"))
    if state.lag_seconds:
        what = f"the coordinator's Mac responds up to {state.lag_seconds:.1f} s late"
        found.append(Finding(Severity.WARNING, what, "Every token passes it.", "end other programs on that Mac"))
    return found


def check_standbys(state: ClusterState) -> list[Finding]:
    """Find standbys that could not take the leader's place, and a second leader."""
    led = state.leadership
    if led is None:
        return []
    why = "It could not take the leader's place, or would know nothing of what was changed since."
    remedy = "macpipe doctor, on that Mac"
    found = [Finding(Severity.WARNING, one.problem, why, remedy, one.name) for one in led.standbys if one.away]
    where = "Each side of a cut may have a leader; the lower term ends once the two reach each other."
    found += [Finding(Severity.WARNING, "it leads too", where, "connect the two Macs", one.name) for one in led.others]
    return found


ANSWER_CHECKS: Final[dict[str, Check[ClusterState]]] = {"workers answer": check_answers}
"""Part of the coordinator's own findings where it has Macs examined."""
CLUSTER_CHECKS: Final[dict[str, Check[ClusterState]]] = {
    "clocks": check_clocks,
    "versions": check_versions,
    "load": check_loads,
    "service": check_service,
    "standbys": check_standbys,
}


def report_unreachable(sentence: str) -> CheckResult:
    """Return the only result of a cluster whose coordinator cannot be asked; ``sentence`` says why."""
    why = "Without it only this Mac could be examined."
    finding = Finding(Severity.PROBLEM, sentence, why, "macpipe serve MODEL, on the Mac that leads")
    return CheckResult("coordinator", (finding,))


def report_not_examined(sentence: str) -> CheckResult:
    """Return the result of a cluster whose Macs the coordinator did not have examined; ``sentence`` says why."""
    what = f"the other Macs were not examined: {sentence}"
    why = "Only an admin of the cluster, as on the coordinator's Mac, can have them examined."
    remedy = "macpipe doctor --cluster, on the coordinator's Mac; or macpipe doctor on each Mac"
    return CheckResult("other Macs", (Finding(Severity.WARNING, what, why, remedy),))
