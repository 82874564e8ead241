"""Encode and decode what an examination of a Mac finds. A worker's answer is checked here, before anybody uses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from cluster.core.errors import WorkerLost
from cluster.core.examination import CheckResult, Finding, MacExamination, Severity
from cluster.core.limits import MAX_FACT_CHARS
from cluster.v1 import cluster_pb2 as pb

MAX_CHECKS: Final = 64
"""Checks of one Mac; macpipe has about 20."""
MAX_FINDINGS: Final = 128
"""Findings of one Mac. Each failed connection to another member is one."""
MAX_FINDING_CHARS: Final = 1024
"""Length of a finding's sentence; the longest known has 200."""

_SEVERITIES: Final = {
    Severity.PROBLEM: pb.FINDING_SEVERITY_PROBLEM,
    Severity.WARNING: pb.FINDING_SEVERITY_WARNING,
    Severity.NOTE: pb.FINDING_SEVERITY_NOTE,
}
_SEVERITY_OF: Final = {number: severity for severity, number in _SEVERITIES.items()}


def encode_results(results: Iterable[CheckResult]) -> list[pb.CheckResult]:
    """Encode the results of one Mac's checks, as much of them as ``decode_results`` accepts."""
    left = MAX_FINDINGS
    messages = []
    for result in tuple(results)[:MAX_CHECKS]:
        findings = (result.findings or ())[:left]
        left -= len(findings)
        encoded = [_encode_finding(finding) for finding in findings]
        messages.append(pb.CheckResult(check=result.check, findings=encoded, unknown=result.findings is None))
    return messages


def decode_results(messages: Sequence[pb.CheckResult], worker: str) -> tuple[CheckResult, ...]:
    """Decode the results that ``worker`` sent. Raises ``WorkerLost`` if they are too many or too long."""
    findings = [finding for message in messages for finding in message.findings]
    texts = [text for finding in findings for text in (finding.what, finding.why, finding.remedy)]
    valid = len(messages) <= MAX_CHECKS and len(findings) <= MAX_FINDINGS
    valid = valid and all(len(message.check) <= MAX_FACT_CHARS for message in messages)
    if not valid or any(len(text) > MAX_FINDING_CHARS for text in texts):
        raise WorkerLost(f"worker {worker} sent an invalid examination of its Mac", worker=worker)
    return tuple(map(_decode_result, messages))


def encode_examination(examination: MacExamination) -> pb.MacExamination:
    """Encode the examination of one Mac for a client."""
    return pb.MacExamination(mac=examination.mac, results=encode_results(examination.results))


def decode_examination(message: pb.MacExamination) -> MacExamination:
    """Decode the examination of one Mac, as a coordinator sends it. Its findings name the Mac."""
    return MacExamination(message.mac, tuple(_decode_result(result, message.mac) for result in message.results))


def _encode_finding(finding: Finding) -> pb.Finding:
    what, why, remedy = (text[:MAX_FINDING_CHARS] for text in (finding.what, finding.why, finding.remedy))
    return pb.Finding(severity=_SEVERITIES[finding.severity], what=what, why=why, remedy=remedy)


def _decode_result(message: pb.CheckResult, mac: str = "") -> CheckResult:
    if message.unknown:
        return CheckResult(message.check, None)
    return CheckResult(message.check, tuple(_decode_finding(finding, mac) for finding in message.findings))


def _decode_finding(message: pb.Finding, mac: str) -> Finding:
    severity = _SEVERITY_OF.get(message.severity, Severity.NOTE)
    return Finding(severity, message.what, message.why, message.remedy, mac)
