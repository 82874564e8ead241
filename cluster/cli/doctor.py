"""``macpipe doctor``: says what is wrong with this Mac or the cluster, why it matters, and what mends it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.error_boundary import FAILED, errors_in_json
from cluster.cli.options import Coordinator, Home, Json
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.text import count_in_words, is_loopback, parse_address
from cluster.platform.paths import short_host_name, state_home

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

    from cluster.core.cluster_state import ClusterState
    from cluster.doctor.finding import CheckResult, Finding
    from cluster.doctor.readings import Readings

MARKS: Final = {"problem": "PROBLEM", "warning": "warning", "note": "note"}


def doctor(
    whole_cluster: Annotated[
        bool, typer.Option("--cluster", help="Examine every Mac of the cluster too, as its coordinator sees it.")
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
        state, unreachable = read_state(coordinator) if whole_cluster else (None, "")
        _, results = examine_mac(state_home(home), members_to_reach(coordinator, state), state, unreachable)
        if json:
            from cluster.cli.json_output import print_json

            print_json(results_as_json(results))
        else:
            show_results(results)
        if has_problem(results):
            raise typer.Exit(FAILED)


def read_state(coordinator: str | None) -> tuple[ClusterState | None, str]:
    """Return the cluster's state, or None and why its coordinator cannot be asked. Raises ``InvalidOption``."""
    from cluster.client import Client

    try:
        with Client(coordinator) as client:
            return client.cluster(), ""
    except InvalidOption:
        raise
    except MacpipeError as error:
        return None, error.sentence


def members_to_reach(coordinator: str | None, state: ClusterState | None) -> list[tuple[str, str, int]]:
    """Return name, host and port of the coordinator and of each worker, except on this machine's loopback."""
    from cluster.client.coordinator_address import choose_coordinator

    listed = [("the coordinator", choose_coordinator(coordinator, None).address)]
    listed += [(worker.name, worker.control_address) for worker in state.workers] if state else []
    members = []
    for name, address in listed:
        try:
            host, port = parse_address(address)
        except MacpipeError:  # a worker of which the coordinator knows no address
            continue
        if not is_loopback(host):
            members.append((name, host, port))
    return members


def examine_mac(
    home: Path, members: list[tuple[str, str, int]], state: ClusterState | None, unreachable: str
) -> tuple[Readings, tuple[CheckResult, ...]]:
    """Read and judge this Mac, then the cluster: its ``state``, or why that is ``unreachable`` if it was asked for."""
    from cluster.doctor.cluster_checks import CLUSTER_CHECKS, report_unreachable
    from cluster.doctor.examination import examine
    from cluster.doctor.finding import name_mac, run_checks
    from cluster.doctor.gathering import read_mac

    readings = read_mac(home, members)
    results = name_mac(examine(readings), short_host_name())
    if state is not None:
        results += name_mac(run_checks(CLUSTER_CHECKS, state), "cluster")
    elif unreachable:
        results += name_mac((report_unreachable(unreachable),), "cluster")
    return readings, results


def results_as_json(results: Iterable[CheckResult]) -> dict[str, Any]:
    """Return the findings, the worst first, and the outcome of each check: ok, found or unknown."""
    from cluster.doctor.finding import all_findings

    checks = {one.check: "unknown" if one.findings is None else "found" if one.findings else "ok" for one in results}
    return {"findings": all_findings(results), "checks": checks}


def show_results(results: tuple[CheckResult, ...]) -> None:
    """Print the findings, then what was fine and what could not be told."""
    from cluster.cli.screen import console
    from cluster.doctor.finding import all_findings

    screen = console(sys.stdout)
    findings = all_findings(results)
    for finding in findings:
        _show_finding(screen, finding)
    fine = [one.check for one in results if one.findings == ()]
    unknown = [one.check for one in results if one.findings is None]
    _show_wrapped(screen, "fine: ", ", ".join(fine) or "nothing")
    if unknown:
        _show_wrapped(screen, "not known here: ", ", ".join(unknown))
    screen.print(_count(findings))


def _show_finding(screen: Console, finding: Finding) -> None:
    mark = MARKS[finding.severity.value]
    _show_wrapped(screen, f"{mark}: ", f"{finding.mac}: {finding.what}" if finding.mac else finding.what)
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
