"""``macpipe doctor``: says what is wrong with this Mac or the cluster, why it matters, and what mends it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.error_boundary import FAILED, errors_in_json
from cluster.cli.options import Coordinator, Home, Json
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.examination import CheckResult, MacExamination
from cluster.core.text import count_in_words
from cluster.platform.paths import short_host_name, state_home

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

    from cluster.core.cluster_state import ClusterState
    from cluster.core.examination import Finding
    from cluster.doctor.readings import Readings

MARKS: Final = {"problem": "PROBLEM", "warning": "warning", "note": "note"}
CLUSTER: Final = "cluster"
"""The name under which findings about the whole cluster are shown."""


@dataclass(frozen=True, slots=True)
class ClusterAnswers:
    """What a coordinator answered: its ``state`` if it could be asked, and what the workers found on their Macs.

    ``failure`` says what it could not be asked for, and why.
    """

    state: ClusterState | None = None
    macs: tuple[MacExamination, ...] = ()
    failure: CheckResult | None = None


def doctor(
    whole_cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Examine every Mac of the cluster (MACPIPE_CLUSTER, else the last one entered) by its coordinator.",
        ),
    ] = False,
    coordinator: Coordinator = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Say what is wrong with this Mac, and what mends it.

    Nothing is changed. Exits with 1 if there is a problem; warnings and notes do not count.
    """
    from cluster.doctor.finding import has_problem

    with errors_in_json(json):
        answers = ask_cluster(coordinator) if whole_cluster else ClusterAnswers()
        _, examined = examine_macs(state_home(home), coordinator, answers)
        if json:
            from cluster.cli.json_output import print_json

            print_json(examinations_as_json(examined))
        else:
            show_examinations(examined)
        if any(has_problem(one.results) for one in examined):
            raise typer.Exit(FAILED)


def ask_cluster(coordinator: str | None) -> ClusterAnswers:
    """Ask the coordinator for the cluster's state, and to have all Macs examined. Raises ``InvalidOption``."""
    from cluster.cli.screen import note
    from cluster.client import Client
    from cluster.doctor.cluster_checks import report_not_examined, report_unreachable

    try:
        with Client(coordinator) as client:
            state = client.cluster()
            if sys.stderr.isatty():
                note("examining the Macs of the cluster, which takes a few seconds")
            try:
                return ClusterAnswers(state, client.examine())
            except MacpipeError as error:
                return ClusterAnswers(state, failure=report_not_examined(error.sentence))
    except InvalidOption:
        raise
    except MacpipeError as error:
        return ClusterAnswers(failure=report_unreachable(error.sentence))


def members_to_reach(coordinator: str | None, state: ClusterState | None) -> list[tuple[str, str, int]]:
    """Return name, host and port of the coordinator and of each worker, except on this machine's loopback."""
    from cluster.client.coordinator_address import choose_coordinator
    from cluster.doctor.gathering import list_members

    workers = state.workers if state else ()
    listed = [(worker.name, worker.control_address) for worker in workers]
    return list_members([("the coordinator", choose_coordinator(coordinator, None).address), *listed])


def examine_macs(
    home: Path, coordinator: str | None, answers: ClusterAnswers
) -> tuple[Readings, tuple[MacExamination, ...]]:
    """Read and judge this Mac, then the cluster and its Macs by the coordinator's answers.

    The first examination is this Mac's. What a worker on this Mac found besides is part of it.
    """
    from cluster.doctor.examination import examine
    from cluster.doctor.finding import add_results, name_mac
    from cluster.doctor.gathering import read_mac
    from cluster.doctor.network_checks import check_members, leave_out_failures

    readings = read_mac(home, members_to_reach(coordinator, answers.state))
    name = short_host_name()
    judged = readings
    if answers.state is None and answers.failure:
        # The coordinator is the only member that is known, so the failed connection and the failed call are one fault.
        judged = leave_out_failures(readings)
        if check_members(judged):
            answers = ClusterAnswers(failure=CheckResult(answers.failure.check, None))
    results = name_mac(examine(judged), name)
    for one in answers.macs:
        if one.mac == name:
            results = add_results(results, one.results)
    cluster = _examine_cluster(answers)
    others = [one for one in answers.macs if one.mac != name]
    return readings, (MacExamination(name, results), *([cluster] if cluster.results else []), *others)


def _examine_cluster(answers: ClusterAnswers) -> MacExamination:
    """Judge the cluster's state. Workers that do not answer have a finding of their own if Macs were examined."""
    from cluster.doctor.cluster_checks import ANSWER_CHECKS, CLUSTER_CHECKS
    from cluster.doctor.finding import name_mac, run_checks

    results: tuple[CheckResult, ...] = (answers.failure,) if answers.failure else ()
    if answers.state is not None:
        checks = CLUSTER_CHECKS if answers.macs else ANSWER_CHECKS | CLUSTER_CHECKS
        results += run_checks(checks, answers.state)
    return MacExamination(CLUSTER, name_mac(results, CLUSTER))


def examinations_as_json(examined: tuple[MacExamination, ...]) -> dict[str, Any]:
    """Return all findings, the worst first, and the outcome of each check on each Mac: ok, found or unknown."""
    from cluster.doctor.finding import all_findings

    findings = all_findings(result for one in examined for result in one.results)
    return {"findings": findings, "checks": {one.mac: _outcomes(one.results) for one in examined}}


def _outcomes(results: Iterable[CheckResult]) -> dict[str, str]:
    return {one.check: "unknown" if one.findings is None else "found" if one.findings else "ok" for one in results}


def show_examinations(examined: tuple[MacExamination, ...]) -> None:
    """Print the findings of each Mac, then what was fine and what could not be told, and the counts at the end."""
    from cluster.cli.screen import console
    from cluster.doctor.finding import all_findings

    screen = console(sys.stdout)
    for one in examined:
        if len(examined) > 1:
            _show_wrapped(screen, "", f"== {one.mac} ==" if one is not examined[0] else f"== {one.mac} (this Mac) ==")
        findings = all_findings(one.results)
        for finding in findings:
            _show_finding(screen, finding, one.mac)
        fine = [result.check for result in one.results if result.findings == ()]
        unknown = [result.check for result in one.results if result.findings is None]
        if fine or not findings:
            _show_wrapped(screen, "fine: ", ", ".join(fine) or "nothing")
        if unknown:
            _show_wrapped(screen, "not known here: ", ", ".join(unknown))
        if len(examined) > 1 and (fine or unknown or not findings):  # an empty line follows each finding as it is
            screen.print()
    screen.print(_count(all_findings(result for one in examined for result in one.results)))


def _show_finding(screen: Console, finding: Finding, mac: str) -> None:
    """Print a finding. It names its Mac if that is not ``mac``, under whose name it is shown."""
    mark = MARKS[finding.severity.value]
    named = "" if finding.mac in ("", mac) else f"{finding.mac}: "
    _show_wrapped(screen, f"{mark}: ", named + finding.what)
    _show_wrapped(screen, "  why:  ", finding.why)
    if finding.remedy:
        _show_wrapped(screen, "  mend: ", finding.remedy)
    screen.print()


def _show_wrapped(screen: Console, label: str, text: str) -> None:
    """Print a label and a text, whose further lines are indented as far as the label is long."""
    import textwrap

    from cluster.cli.screen import printable

    if not screen.is_terminal:
        screen.print(f"{label}{printable(text)}", soft_wrap=True)
        return
    indent = " " * len(label)
    lines = textwrap.wrap(
        printable(text), max(20, screen.width - len(label)), break_long_words=False, break_on_hyphens=False
    )
    screen.print(label + f"\n{indent}".join(lines), soft_wrap=True)


def _count(findings: tuple[Finding, ...]) -> str:
    counts = {kind: sum(one.severity.value == kind for one in findings) for kind in MARKS}
    return ", ".join(count_in_words(count, kind) for kind, count in counts.items())
