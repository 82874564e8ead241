"""Runs checks, and orders and counts what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final, TypeVar

from cluster.core.examination import CheckResult, Finding, Severity

Facts = TypeVar("Facts")

ORDER: Final = tuple(Severity)
"""The worst first."""

Check = Callable[[Facts], Iterable[Finding] | None]
"""Returns findings, or None if the facts do not say enough."""


def run_checks(checks: dict[str, Check[Facts]], facts: Facts) -> tuple[CheckResult, ...]:
    """Run the checks in their order."""
    return tuple(_run_check(name, check, facts) for name, check in checks.items())


def _run_check(name: str, check: Check[Facts], facts: Facts) -> CheckResult:
    found = check(facts)
    return CheckResult(name, None if found is None else tuple(found))


def name_mac(results: Iterable[CheckResult], mac: str) -> tuple[CheckResult, ...]:
    """Return the results with the name of the Mac in each finding that names none."""
    return tuple(
        one
        if one.findings is None
        else replace(one, findings=tuple(found if found.mac else replace(found, mac=mac) for found in one.findings))
        for one in results
    )


def add_results(results: Iterable[CheckResult], others: Iterable[CheckResult]) -> tuple[CheckResult, ...]:
    """Return the results of a Mac, with what ``others``, a second examination of it, found besides."""
    merged = {one.check: one.findings for one in results}
    for other in others:
        known = merged.get(other.check)
        if known is None:
            merged[other.check] = other.findings
        else:
            merged[other.check] = known + tuple(one for one in other.findings or () if one not in known)
    return tuple(CheckResult(check, findings) for check, findings in merged.items())


def all_findings(results: Iterable[CheckResult]) -> tuple[Finding, ...]:
    """Return all findings, the worst first; otherwise in their order."""
    found = [finding for one in results for finding in one.findings or ()]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.severity)))


def has_problem(results: Iterable[CheckResult]) -> bool:
    """Return whether any finding is a problem."""
    return any(finding.severity is Severity.PROBLEM for finding in all_findings(results))
