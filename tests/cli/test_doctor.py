"""``macpipe doctor`` and ``macpipe report`` from the outside, and their screen at 80 columns."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.scripted import Coordinator, cluster_reply
from cluster.cli.doctor import ClusterAnswers, examinations_as_json, examine_macs, members_to_reach, show_examinations
from cluster.codec.cluster_state import decode_cluster_state
from cluster.codec.examination import encode_examination
from cluster.core.examination import CheckResult, Finding, MacExamination, Severity
from cluster.doctor.cluster_checks import report_unreachable
from cluster.doctor.readings import MemberConnection, Reached, Readings, Versions
from cluster.platform.mac_commands import MacOutputs

Macpipe = Any
LONG = Finding(
    Severity.PROBLEM,
    "macOS blocks connections to mac-2 (192.168.1.7:50051) and to mac-3 (192.168.1.8:50051): no route to host",
    "Since macOS 15, each program needs permission for the local network. A program that launchd starts has none.",
    "turn on your terminal or Python in System Settings > Privacy & Security > Local Network",
    "mac-1",
)
RESULTS = (
    CheckResult("VPN", (Finding(Severity.NOTE, "a VPN is connected", "It may block mDNS."),)),
    CheckResult("connections to members", (LONG,)),
    CheckResult("disk"),
    CheckResult("RDMA", None),
)
FULL_DISK = Finding(Severity.PROBLEM, "0.488 GiB are free", "Layers are stored there.", "du -sh", "mac-2")
EXAMINED = (MacExamination("mac-1", RESULTS), MacExamination("mac-2", (CheckResult("disk", (FULL_DISK,)),)))


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns."""
    shown = io.StringIO()
    monkeypatch.setattr(
        "cluster.cli.screen.console",
        lambda _: Console(file=shown, width=80, force_terminal=True, color_system=None, markup=False, highlight=False),
    )
    return shown


def test_a_screen_of_80_columns_shows_all(screen: io.StringIO) -> None:
    show_examinations(EXAMINED[:1])
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("PROBLEM: macOS blocks connections to mac-2")
    assert lines[1].startswith(" " * len("PROBLEM: "))
    assert " ".join(" ".join(lines).split()).count(LONG.remedy) == 1
    assert lines[-3:] == ["fine: disk", "not known here: RDMA", "1 problem, 0 warnings, 1 note"]


def test_findings_are_shown_by_mac(screen: io.StringIO) -> None:
    show_examinations(EXAMINED)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "== mac-1 (this Mac) =="
    second = lines.index("== mac-2 ==")
    assert lines.index("PROBLEM: 0.488 GiB are free") > second > lines.index("fine: disk")
    assert lines[-1] == "2 problems, 0 warnings, 1 note"


def test_json_has_the_findings_and_each_outcome() -> None:
    shown = examinations_as_json(EXAMINED)
    assert [(one.severity, one.mac) for one in shown["findings"]] == [
        ("problem", "mac-1"),
        ("problem", "mac-2"),
        ("note", ""),
    ]
    first = {"VPN": "found", "connections to members": "found", "disk": "ok", "RDMA": "unknown"}
    assert shown["checks"] == {"mac-1": first, "mac-2": {"disk": "found"}}


def test_what_a_worker_on_this_mac_finds_is_part_of_its_examination(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's own permission for the local network may differ from that of the terminal."""
    monkeypatch.setattr("cluster.cli.doctor.short_host_name", lambda: "mac-1")
    _, alone = examine_macs(tmp_path, None, ClusterAnswers())
    same = tuple(one for one in alone[0].results if one.findings)
    theirs = (*same, CheckResult("connections to members", (LONG,)))
    _, both = examine_macs(tmp_path, None, ClusterAnswers(macs=(MacExamination("mac-1", theirs), EXAMINED[1])))
    assert [one.mac for one in both] == ["mac-1", "mac-2"]
    before, after = ({one.check: one.findings for one in found[0].results} for found in (alone, both))
    assert after == before | {"connections to members": (LONG,)}


def test_members_on_loopback_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACPIPE_COORDINATOR", raising=False)
    state = decode_cluster_state(cluster_reply())
    assert members_to_reach(None, state) == [("mac-a", "10.0.0.1", 5000), ("mac-b", "10.0.0.2", 5000)]
    assert members_to_reach("mac-9.local", None) == [("the coordinator", "mac-9.local", 7700)]


def test_doctor_judges_this_machine(macpipe: Macpipe, tmp_path: Path) -> None:
    done = macpipe("doctor", "--json", "--home", str(tmp_path))
    found = json.loads(done.stdout)
    (checks,) = found["checks"].values()
    assert {"MLX", "disk", "certificates", "RDMA"} <= set(checks)
    assert done.returncode == any(one["severity"] == "problem" for one in found["findings"])
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_a_cluster_names_a_worker_that_does_not_answer(
    macpipe: Macpipe, coordinator: Coordinator, tmp_path: Path
) -> None:
    done = macpipe("doctor", "--cluster", "--json", "--home", str(tmp_path), to=coordinator)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["checks"]["cluster"]["workers answer"] == "found"
    named = [(one["mac"], one["what"]) for one in found["findings"]]
    assert ("mac-b", "no answer for 3 s") in named
    assert any(what.startswith("the other Macs were not examined: ") for mac, what in named if mac == "cluster")


def test_doctor_of_a_cluster_shows_what_the_workers_found(
    macpipe: Macpipe, coordinator: Coordinator, tmp_path: Path
) -> None:
    coordinator.script.examined = [encode_examination(one) for one in EXAMINED]
    done = macpipe("doctor", "--cluster", "--home", str(tmp_path), to=coordinator)
    assert done.returncode == 1
    assert done.stdout.count("no route to host") == 1
    mac_2 = done.stdout.partition("== mac-2 ==")[2]
    assert "PROBLEM: 0.488 GiB are free\n  why:  Layers are stored there.\n  mend: du -sh\n" in mac_2
    assert "it has not answered" not in done.stdout


def test_doctor_without_a_coordinator_still_judges_this_machine(macpipe: Macpipe, tmp_path: Path) -> None:
    done = macpipe("doctor", "--cluster", "--coordinator", "127.0.0.1:1", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "PROBLEM: no coordinator answers at 127.0.0.1:1" in done.stdout
    assert "fine: " in done.stdout
    assert "\n  mend: macpipe serve MODEL, on the Mac that leads\n\n1 problem" in done.stdout


@pytest.mark.parametrize(
    ("reached", "system", "mac", "cluster"),
    [
        (Reached.REFUSED, "Darwin", "unknown", "found"),
        (Reached.NO_ROUTE, "Linux", "unknown", "found"),
        (Reached.CONNECTED, "Darwin", "ok", "found"),
        (Reached.NO_ROUTE, "Darwin", "found", "unknown"),
    ],
)
def test_a_coordinator_that_does_not_answer_is_one_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reached: Reached, system: str, mac: str, cluster: str
) -> None:
    """The finding of the permission for the local network stays, for only this Mac knows of it."""
    peer = MemberConnection("the coordinator", "192.168.1.7", 7700, reached)
    readings = Readings(system, 0.0, MacOutputs(), Versions("0.1.0", "3.12.4"), str(tmp_path), 0, connections=(peer,))
    monkeypatch.setattr("cluster.doctor.gathering.read_mac", lambda *_: readings)
    read, examined = examine_macs(tmp_path, None, ClusterAnswers(failure=report_unreachable("no coordinator answers")))
    outcomes = list(examinations_as_json(examined)["checks"].values())
    assert (outcomes[0]["connections to members"], outcomes[1]["coordinator"]) == (mac, cluster)
    assert read.connections == (peer,), "a report holds what was read"


def test_report_writes_a_private_bundle_and_never_over_a_file(
    macpipe: Macpipe, coordinator: Coordinator, tmp_path: Path
) -> None:
    file = tmp_path / "bug.zip"
    done = macpipe("report", str(file), "--home", str(tmp_path / "home"), to=coordinator)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(file) as bundle:
        assert [worker["name"] for worker in json.loads(bundle.read("cluster.json"))["workers"]] == ["mac-a", "mac-b"]
        assert json.loads(bundle.read("readings.json"))["versions"]["macpipe"]
    again = macpipe("report", str(file), to=coordinator)
    assert again.returncode == 2
    assert "name another FILE" in again.stderr


def test_report_without_a_coordinator_says_so_in_the_bundle(macpipe: Macpipe, tmp_path: Path) -> None:
    file = tmp_path / "bug.zip"
    done = macpipe("report", str(file), "--json", "--coordinator", "127.0.0.1:1", "--home", str(tmp_path / "home"))
    assert json.loads(done.stdout) == {"file": str(file)}
    with zipfile.ZipFile(file) as bundle:
        assert json.loads(bundle.read("cluster.json")) == {}
        assert json.loads(bundle.read("findings.json"))["checks"]["cluster"]["coordinator"] == "found"
