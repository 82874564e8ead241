"""Checks of what macpipe keeps on this Mac: certificates, measured speeds, and processes that were left behind."""

from __future__ import annotations

from typing import Final

from cluster.core.examination import Finding, Severity
from cluster.core.text import count_in_words, duration_in_words
from cluster.doctor.readings import CertificateReading, ProfileReading, Readings
from cluster.security.certificate_renewal import due_at

DAY_S: Final = 86_400.0
RENEWAL_LATE_S: Final = 7 * DAY_S
"""How long after the usual time of renewal a certificate is called overdue."""
OLD_PROFILE_S: Final = 180 * DAY_S
"""macOS and MLX updates change a Mac's speed; a measurement of this age is called old."""
ENGINE: Final = "cluster.worker.engine"


def check_certificates(readings: Readings) -> list[Finding]:
    """Find certificates that are damaged, not valid now, or overdue for renewal."""
    return [found for one in readings.certificates for found in _check_certificate(one, readings.now)]


def _check_certificate(one: CertificateReading, now: float) -> list[Finding]:
    who = f"the {one.role}'s certificate in cluster {one.cluster}" + (f" ({one.name})" if one.name else "")
    lost = "Every connection of a cluster needs a valid certificate."
    if one.damage:
        return [Finding(Severity.PROBLEM, f"{who} cannot be used: {one.damage}", lost, "macpipe join TOKEN")]
    if now < one.not_before:
        what = f"{who} is valid only in {duration_in_words(one.not_before - now)}: this Mac's clock is behind"
        return [Finding(Severity.PROBLEM, what, lost, "sudo sntp -sS time.apple.com")]
    if now > one.not_after:
        what = f"{who} expired {duration_in_words(now - one.not_after)} ago"
        remedy = "macpipe join TOKEN, with a token that `macpipe token create` makes on the coordinator's Mac"
        return [Finding(Severity.PROBLEM, what, lost, remedy)]
    if now > due_at(one.not_before, one.not_after) + RENEWAL_LATE_S:
        what = f"{who} was not renewed and expires in {duration_in_words(one.not_after - now)}"
        why = "It renews itself while macpipe runs here and the coordinator answers."
        return [Finding(Severity.WARNING, what, why, "start the coordinator, then `macpipe worker` here")]
    return []


def check_profiles(readings: Readings) -> list[Finding]:
    """Find measurements of a worker's speed that are old, or that were made while the Mac was busy."""
    return [
        Finding(
            Severity.NOTE,
            what,
            "Plans divide layers by measured speed.",
            f"macpipe worker --name {one.worker} --profile new",
        )
        for one in readings.profiles
        if (what := _describe_profile(one, readings.now))
    ]


def _describe_profile(one: ProfileReading, now: float) -> str:
    """Return what may be wrong with a worker's stored speed, or an empty string."""
    if one.disturbed:
        return f"the speed of worker {one.worker} was measured while this Mac was busy: {one.disturbed}"
    if now - one.written > OLD_PROFILE_S:
        return f"the stored speed of worker {one.worker} is {duration_in_words(now - one.written)} old"
    return ""


def check_processes(readings: Readings) -> list[Finding] | None:
    """Find engines whose worker has ended."""
    if readings.processes is None:
        return None
    known = {one.pid for one in readings.processes}
    left = [one.pid for one in readings.processes if one.module == ENGINE and one.parent not in known]
    if not left:
        return []
    pids = " ".join(map(str, left))
    what = f"{count_in_words(len(left), 'engine')} without a worker: process {pids.replace(' ', ', ')}"
    why = "An engine holds its layers in memory until it ends."
    return [Finding(Severity.PROBLEM, what, why, f"kill {pids}")]
