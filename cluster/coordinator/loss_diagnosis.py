"""Find the worker that broke a ring. A closed stream names only the neighbour that noticed, not the Mac that is gone.

Pure: takes the workers' descriptions and returns names and sentences.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.coordinator.roster import RosterEntry
from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.plan import Plan, PlannedStage
from cluster.core.text import with_subject
from cluster.core.worker import WorkerInfo


def diagnose(
    cause: MacpipeError, plan: Plan, members: Iterable[RosterEntry], before: Iterable[WorkerInfo]
) -> MacpipeError:
    """Return a ``WorkerLost`` naming the workers that no longer hold their stage; ``cause`` if all still do.

    ``before`` are the plan's workers as they were when they loaded it.
    """
    found = verdicts(plan, members, before)
    if not found:
        return cause
    return WorkerLost("; ".join(found.values()), worker=next(iter(found)))


def verdicts(plan: Plan, members: Iterable[RosterEntry], before: Iterable[WorkerInfo]) -> dict[str, str]:
    """Return a sentence for each worker of a plan that no longer holds its stage, by worker name."""
    known = {m.info.name: m for m in members}
    processes = {worker.name: worker.instance for worker in before}
    found = ((s.worker, _verdict(s, known.get(s.worker), processes.get(s.worker, ""))) for s in plan.stages)
    return {worker: why for worker, why in found if why}


def _verdict(stage: PlannedStage, member: RosterEntry | None, process: str) -> str:
    """Return why a worker no longer holds its stage, which it loaded in the process with that id; "" if it does."""
    if member is None:
        return f"worker {stage.worker} is missing"
    if member.problem and not member.reachable and not member.outside:
        return f"{stage.worker} stopped answering"  # the log and `status` say at which address, and how
    if member.problem:
        return with_subject(stage.worker, member.problem, f"worker {stage.worker}")
    info = member.info
    if not info.epoch:
        restarted = "it" if process != info.instance else "its engine"
        return f"worker {stage.worker} lost layers {stage.layers}: {restarted} was restarted"
    if info.epoch > stage.spec.epoch:
        return f"worker {stage.worker} was taken over: another coordinator loaded {info.model} there"
    return ""


def find_hanging(plan: Plan, members: Iterable[RosterEntry], busy_ms: float) -> str | None:
    """Return the plan's worker with the longest running step, if that step has taken ``busy_ms`` or more."""
    planned = {s.worker for s in plan.stages}
    busy = [(m.info.busy_ms, m.info.name) for m in members if m.info.name in planned and not m.problem]
    longest, worker = max(busy, default=(0, ""))
    return worker if longest >= busy_ms else None


def is_excused(member: RosterEntry) -> bool:
    """Return whether the engine is slow rather than hung: it computes, or its machine is overloaded."""
    return member.info.computing or member.info.lag_seconds > 0


def unservable(cause: MacpipeError, why: MacpipeError) -> WorkerLost:
    """Return the error of requests that end because no plan fits: the lost worker, and the missing bytes if known."""
    worker = cause.details.get("worker", "")
    missing = why.details.get("missing_bytes", "")
    sentence = f"{cause.sentence}; the remaining workers cannot serve the model: {why.sentence}"
    return (
        WorkerLost(sentence, worker=worker, missing_bytes=missing) if missing else WorkerLost(sentence, worker=worker)
    )
