"""Who is to blame when a ring breaks: a stream that ends tells which neighbour saw it, not which Mac is gone.

Pure: what workers say of themselves goes in, names and sentences come out.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.coordinator.roster import RosterEntry
from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.plan import Plan, PlannedStage
from cluster.core.text import with_subject


def diagnose(cause: MacpipeError, plan: Plan, members: Iterable[RosterEntry]) -> MacpipeError:
    """The loss, with the workers named that no longer hold their stage; ``cause`` itself where all of them do."""
    found = verdicts(plan, members)
    if not found:
        return cause
    return WorkerLost("; ".join(found.values()), worker=next(iter(found)))


def verdicts(plan: Plan, members: Iterable[RosterEntry]) -> dict[str, str]:
    """What is wrong with each worker of a plan that no longer holds its stage, by name; empty where all do."""
    known = {m.facts.name: m for m in members}
    found = ((s.worker, _verdict(s, known.get(s.worker))) for s in plan.stages)
    return {worker: why for worker, why in found if why}


def _verdict(stage: PlannedStage, member: RosterEntry | None) -> str:
    if member is None:
        return f"worker {stage.worker} is not there"
    if member.problem:
        return with_subject(stage.worker, member.problem, f"worker {stage.worker}")
    facts = member.facts
    if not facts.epoch:
        return f"worker {stage.worker} lost layers {stage.layers}: its engine was restarted"
    if facts.epoch > stage.spec.epoch:
        return f"worker {stage.worker} was taken over: another coordinator loaded {facts.model} there"
    return ""


def find_hanging(plan: Plan, members: Iterable[RosterEntry], busy_ms: float) -> str | None:
    """The worker of the plan whose engine has been at one step for longest, where that is too long."""
    mine = {s.worker for s in plan.stages}
    busy = [(m.facts.busy_ms, m.facts.name) for m in members if m.facts.name in mine and not m.problem]
    longest, worker = max(busy, default=(0, ""))
    return worker if longest >= busy_ms else None


def is_excused(member: RosterEntry) -> bool:
    """Whether its engine is slow rather than hung: it computes, or its machine is overloaded."""
    return member.facts.computing or member.facts.lag_s > 0


def unservable(cause: MacpipeError, why: MacpipeError) -> WorkerLost:
    """For requests that end because nothing fits: whose loss it was, and what is missing."""
    worker, missing = cause.details.get("worker", ""), why.details.get("missing_bytes", "")
    sentence = f"{cause.sentence}; what is left cannot serve: {why.sentence}"
    return (
        WorkerLost(sentence, worker=worker, missing_bytes=missing) if missing else WorkerLost(sentence, worker=worker)
    )
