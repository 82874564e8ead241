"""What an examination finds: findings, and for each check whether it found something, nothing, or could not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeVar

Facts = TypeVar("Facts")


class Severity(StrEnum):
    """How much a finding matters. Only problems make the command fail."""

    PROBLEM = "problem"
    """Something does not work, or an answer will end because of it."""
    WARNING = "warning"
    """It works, but slower or less reliably than it could."""
    NOTE = "note"
    """Worth knowing; nothing has to be done."""


ORDER: Final = tuple(Severity)
"""The worst first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``what`` is so, ``why`` it matters, and the ``remedy``: a command or steps, which macpipe never runs itself."""

    severity: Severity
    what: str
    why: str
    remedy: str = ""
    mac: str = ""
    """The Mac's name; empty for the one that was asked."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``findings`` is None if the check could not tell, as where a command does not exist."""

    check: str
    findings: tuple[Finding, ...] | None = ()


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


def all_findings(results: Iterable[CheckResult]) -> tuple[Finding, ...]:
    """Return all findings, the worst first; otherwise in their order."""
    found = [finding for one in results for finding in one.findings or ()]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.severity)))


def has_problem(results: Iterable[CheckResult]) -> bool:
    """Return whether any finding is a problem."""
    return any(finding.severity is Severity.PROBLEM for finding in all_findings(results))
