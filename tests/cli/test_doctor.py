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
from cluster.cli.doctor import members_to_reach, results_as_json, show_results
from cluster.codec.cluster_state import decode_cluster_state
from cluster.doctor.finding import CheckResult, Finding, Severity

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


def test_a_screen_of_80_columns_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        "cluster.cli.screen.console",
        lambda _: Console(file=screen, width=80, force_terminal=True, color_system=None, markup=False, highlight=False),
    )
    show_results(RESULTS)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("PROBLEM: mac-1: macOS blocks connections to mac-2")
    assert lines[1].startswith(" " * len("PROBLEM: "))
    assert " ".join(" ".join(lines).split()).count(LONG.remedy) == 1
    assert lines[-3:] == ["fine: disk", "not known here: RDMA", "1 problem, 0 warnings, 1 note"]


def test_json_has_the_findings_and_each_outcome() -> None:
    shown = results_as_json(RESULTS)
    assert [one.severity for one in shown["findings"]] == ["problem", "note"]
    assert shown["checks"] == {"VPN": "found", "connections to members": "found", "disk": "ok", "RDMA": "unknown"}


def test_members_on_loopback_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACPIPE_COORDINATOR", raising=False)
    state = decode_cluster_state(cluster_reply())
    assert members_to_reach(None, state) == [("mac-a", "10.0.0.1", 5000), ("mac-b", "10.0.0.2", 5000)]
    assert members_to_reach("mac-9.local", None) == [("the coordinator", "mac-9.local", 7700)]


def test_doctor_judges_this_machine(macpipe: Macpipe, tmp_path: Path) -> None:
    done = macpipe("doctor", "--json", "--home", str(tmp_path))
    found = json.loads(done.stdout)
    assert {"MLX", "disk", "certificates", "RDMA"} <= set(found["checks"])
    assert done.returncode == any(one["severity"] == "problem" for one in found["findings"])
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_a_cluster_names_a_worker_that_does_not_answer(
    macpipe: Macpipe, coordinator: Coordinator, tmp_path: Path
) -> None:
    done = macpipe("doctor", "--cluster", "--json", "--home", str(tmp_path), to=coordinator)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["checks"]["workers answer"] == "found"
    assert ("mac-b", "no answer for 3 s") in [(one["mac"], one["what"]) for one in found["findings"]]


def test_doctor_without_a_coordinator_still_judges_this_machine(macpipe: Macpipe, tmp_path: Path) -> None:
    done = macpipe("doctor", "--cluster", "--coordinator", "127.0.0.1:1", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "PROBLEM: cluster: no coordinator answers at 127.0.0.1:1" in done.stdout
    assert "fine: " in done.stdout


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
        assert json.loads(bundle.read("findings.json"))["checks"]["coordinator"] == "found"
