"""A coordinator has all Macs examined; a worker that cannot be asked is a finding itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.examinations import Examinations
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import Busy, MacpipeError, VersionMismatch, WorkerLost
from cluster.core.examination import CheckResult, Finding, Severity
from cluster.core.worker import WorkerInfo
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, control_server

UNKNOWN = WorkerInfo("", "", "0.0.9", "c", "", "", "", "", "", 0, 0)
VPN = CheckResult("VPN", (Finding(Severity.NOTE, "a VPN is connected", "It may block mDNS."),))


def entry(name: str, **given: Any) -> RosterEntry:
    return RosterEntry(replace(UNKNOWN, id=name, name=name, control_address=name), **given)


@pytest.mark.anyio
async def test_each_worker_is_asked_and_those_that_cannot_be_are_findings() -> None:
    answers: dict[str, tuple[CheckResult, ...] | MacpipeError] = {
        "mac-1": (VPN,),
        "mac-2": VersionMismatch("the server does not implement this call"),
        "mac-3": WorkerLost("worker mac-3 at mac-3 does not answer"),
        "mac-4": (),
        "mac-6": Busy("worker mac-6: this Mac is busy"),
    }
    told: dict[str, list[str]] = {}

    def control(address: str) -> Any:
        async def examine(others: list[WorkerInfo]) -> tuple[CheckResult, ...]:
            told[address] = [one.name for one in others]
            if isinstance(answer := answers[address], MacpipeError):
                raise answer
            return answer

        return SimpleNamespace(examine=examine)

    async def members() -> tuple[RosterEntry, ...]:
        away = entry("mac-5", problem="mac-5 does not answer", reachable=False)
        other = entry("mac-4", problem="mac-4 serves faq for another coordinator")
        return (entry("mac-1"), entry("mac-2"), entry("mac-3"), other, away, entry("mac-6"))

    roster: Any = SimpleNamespace(control=control)
    examined = await Examinations(roster, members).run()
    assert [one.mac for one in examined] == [f"mac-{number}" for number in range(1, 7)]
    assert examined[0].results == (CheckResult("worker"), VPN)
    assert told["mac-1"] == ["mac-2", "mac-3", "mac-4", "mac-6"]
    assert "mac-5" not in told
    findings = {one.mac: one.results[0].findings or () for one in examined[1:]}
    assert {mac: [one.what for one in found] for mac, found in findings.items()} == {
        "mac-2": ["it runs macpipe 0.0.9, which cannot examine its Mac for others"],
        "mac-3": ["worker mac-3 at mac-3 does not answer"],
        "mac-4": ["mac-4 serves faq for another coordinator"],
        "mac-5": ["mac-5 does not answer"],
        "mac-6": ["worker mac-6: this Mac is busy"],
    }
    severities = {mac: one.severity for mac, found in findings.items() for one in found}
    assert severities.pop("mac-6") is Severity.WARNING
    assert set(severities.values()) == {Severity.PROBLEM}


@pytest.mark.anyio
async def test_a_worker_of_an_older_version_says_that_it_cannot() -> None:
    server = control_server(LocalTrust())
    control = WorkerClient(LocalTrust(), f"127.0.0.1:{bind(server, LocalTrust(), '127.0.0.1', 0)}", "c0" * 8)
    await server.start()
    try:
        with pytest.raises(VersionMismatch):
            await control.examine([])
    finally:
        await control.close()
        await server.stop(None)
