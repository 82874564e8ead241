"""Has all Macs of the cluster examined by their workers. A worker that cannot do so is a finding itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio

from cluster.coordinator.concurrent_calls import call_for_each
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.core.errors import Busy, MacpipeError, VersionMismatch
from cluster.core.examination import CheckResult, Finding, MacExamination, Severity
from cluster.core.worker import WorkerInfo

CHECK: Final = "worker"
"""The check whose findings the coordinator adds: whether the worker answers and can be used."""
REMEDY: Final = "macpipe doctor, on that Mac"


class Examinations:
    """Runs one examination of the cluster at a time. ``members`` returns the workers as they are known now."""

    def __init__(self, roster: Roster, members: Callable[[], Awaitable[tuple[RosterEntry, ...]]]) -> None:
        self._roster, self._members = roster, members
        self._running = anyio.Lock()

    async def run(self) -> tuple[MacExamination, ...]:
        """Examine all Macs at once. Return one result for each worker, by name."""
        async with self._running:
            entries = await self._members()
            return tuple(await call_for_each(lambda entry: self._examine(entry, entries), entries))

    async def _examine(self, entry: RosterEntry, entries: Sequence[RosterEntry]) -> MacExamination:
        info = entry.info
        findings = [_describe_problem(entry)] if entry.problem else []
        results: tuple[CheckResult, ...] = ()
        if entry.reachable:
            others = [other.info for other in entries if other.reachable and other.info.id != info.id]
            try:
                results = await self._roster.control(info.control_address).examine(others)
            except MacpipeError as error:
                findings.append(_describe_failure(info, error))
        return MacExamination(info.name, (CheckResult(CHECK, tuple(findings)), *results))


def _describe_problem(entry: RosterEntry) -> Finding:
    why = "It gets no layers until this is mended."
    if not entry.reachable:
        why += " Its Mac could not be examined."
    return Finding(Severity.PROBLEM, entry.problem, why, REMEDY)


def _describe_failure(info: WorkerInfo, error: MacpipeError) -> Finding:
    why = "Its Mac could not be examined."
    if isinstance(error, VersionMismatch):
        what = f"it runs macpipe {info.version}, which cannot examine its Mac for others"
        return Finding(Severity.PROBLEM, what, why, "install the same version on all Macs; until then " + REMEDY)
    severity = Severity.WARNING if isinstance(error, Busy) else Severity.PROBLEM
    return Finding(severity, error.sentence, why, REMEDY)
