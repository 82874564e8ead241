"""Say in lines who leads a cluster, and which coordinators stand by."""

from __future__ import annotations

from cluster.core.leadership import LeadershipState, Replicate, StandbyState

__all__ = ["describe_leadership"]


def describe_leadership(state: LeadershipState | None) -> list[str]:
    """Return who leads, since when, and a line for each standby and each further leader; none without standbys."""
    from cluster.cli.screen import format_duration

    if state is None:
        return []
    if state.leader is None:
        return ["leader: none; a standby takes over once the workers of a whole model answer"]
    since = f"for {format_duration(state.since_seconds)} by term {state.term}" if state.term else "without workers yet"
    lines = [f"leader: {state.leader.name} {since}"]
    lines += [f"standby: {one.name}{_describe_standby(one, state.replicate)}" for one in state.standbys]
    for other in state.others:
        where = ", ".join(other.addresses)
        lines.append(f"problem: {other.name} leads too, at {where}; the lower term ends once the two reach each other")
    return lines


def _describe_standby(standby: StandbyState, replicate: Replicate | None) -> str:
    from cluster.cli.screen import format_duration

    where = f" at {standby.addresses[0]}" if standby.addresses else ""
    if standby.in_sync and replicate is Replicate.SYNC:
        return f"{where}, in sync: answers go on there if the leader is lost"
    if standby.silent_seconds:
        return f"{where}, lost: it has not answered for {format_duration(standby.silent_seconds)}"
    if standby.away:
        return f"{where}, does not follow: {standby.problem}"
    behind = f"{standby.behind} updates behind" if standby.behind else "follows"
    return f"{where}, {standby.problem or behind}"
