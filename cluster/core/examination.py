"""What an examination of a Mac finds: for each check its findings, none, or that it could not tell."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

EXAMINE_S: Final = 30.0
"""Time that a worker's examination of its Mac may take. It takes two seconds, but commands have 5 s, connections 3 s,
and it runs at low priority on a Mac that may be busy."""


class Severity(StrEnum):
    """How much a finding matters. Only problems make the command fail."""

    PROBLEM = "problem"
    """Something does not work, or an answer will end because of it."""
    WARNING = "warning"
    """It works, but slower or less reliably than it could."""
    NOTE = "note"
    """Worth knowing; nothing has to be done."""


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


@dataclass(frozen=True, slots=True)
class MacExamination:
    """The results of all checks of one Mac, by its worker's name."""

    mac: str
    results: tuple[CheckResult, ...]
