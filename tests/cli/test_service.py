"""The ``service`` command, with a stand-in for systemctl on the PATH. No service is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli.service import PASSED_ON, own_command, service_environment, uninstall
from cluster.core.errors import MacpipeError
from cluster.platform.services import Finished
from cluster.platform.systemd import Systemd

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands in for systemctl")
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$2" in show) printf 'LoadState=loaded\\nMainPID=%s\\nExecMainCode=0\\nExecMainStatus=0\\n' "$SERVICE_PID";; esac
"""
Service = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def service(macpipe: Service, environment: dict[str, str], tmp_path: Path) -> Service:
    """Run ``macpipe service`` with a home and a systemctl of its own."""
    stand_in = tmp_path / "bin" / "systemctl"
    stand_in.parent.mkdir()
    stand_in.write_text(SYSTEMCTL)
    stand_in.chmod(0o755)
    places = {
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "XDG_CONFIG_HOME": str(tmp_path / "settings"),
        "MACPIPE_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }

    def run(*arguments: str, pid: int = 0) -> subprocess.CompletedProcess[str]:
        return macpipe("service", *arguments, SERVICE_PID=str(pid), **places)

    return run


def test_a_service_is_installed_watched_and_removed(service: Service, tmp_path: Path) -> None:
    log = tmp_path / "home" / "logs" / "worker.log"
    done = service("install", "worker", "--", "--name", "mac-7")
    assert (done.returncode, f"logs to {log}\n" in done.stdout) == (0, True)
    unit = tmp_path / "settings" / "systemd" / "user" / "macpipe-worker.service"
    text = unit.read_text()
    assert f'"worker" "--name" "mac-7" "--log-file" "{log}"' in text
    assert "hf_secret" not in text
    assert "there is no log" in service("logs", "worker").stderr
    log.write_text("one\ntwo\nthree\n")
    assert service("logs", "worker", "-n", "2").stdout == "two\nthree\n"
    done = service("status", "worker", "--json", pid=42)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "daemon": "worker",
        "installed": True,
        "loaded": True,
        "pid": 42,
        "exit_status": None,
        "definition": str(unit),
        "log": str(log),
    }
    assert service("status", "worker").returncode == 1
    assert service("uninstall", "worker").returncode == 0
    assert not unit.exists()
    assert log.exists()


def test_a_folder_that_exists_keeps_its_mode(service: Service, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    fresh = tmp_path / "fresh"
    for folder in (tmp_path, fresh):
        assert service("install", "worker", "--", "--log-file", str(folder / "x.log")).returncode == 0
    assert [oct(folder.stat().st_mode & 0o777) for folder in (tmp_path, fresh)] == ["0o755", "0o700"]


def test_a_service_is_removed_although_systemd_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manager = Systemd(tmp_path, lambda *_: Finished(1, "Failed to connect to bus: No medium found\n"))
    monkeypatch.setattr("cluster.cli.service.service_manager", lambda: manager)
    unit = manager.definition_path("worker")
    unit.touch()
    uninstall("worker")
    said = capsys.readouterr()
    assert (said.out, unit.exists()) == (f"removed {unit}\n", False)
    why = "`systemctl --user disable --now macpipe-worker.service` failed: Failed to connect to bus: No medium found"
    assert said.err == f"the service manager could not be told: {why}; worker may run until you log out\n"
    unit.mkdir()
    with pytest.raises(MacpipeError, match=f"cannot remove {unit}: "):
        uninstall("worker")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("install", "worker", "--", "--prot", "5"), 2, "No such option: --prot"),
        (("install", "serve"), 2, "name at least one model, or a file of models with --models"),
        (("install", "chat"), 2, "unknown daemon chat; give worker or serve"),
        (("start", "worker"), 1, "the service worker is not installed; run `macpipe service install worker`"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    service: Service, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = service(*arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "settings").exists()


def test_a_service_starts_the_same_macpipe_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "macpipe"
    script.parent.mkdir()
    (tmp_path / "real").write_text("#!/bin/sh\n")
    (tmp_path / "real").chmod(0o755)
    script.symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/macpipe", "service"])
    assert own_command() == (str(script),), "an upgrade replaces what the link points to"
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py"])
    assert own_command() == (sys.executable, "-m", "cluster")


def test_secrets_of_the_shell_are_not_written_down(tmp_path: Path) -> None:
    shell = dict.fromkeys((*PASSED_ON, "HF_TOKEN", "MACPIPE_API_KEY", "PATH"), "x")
    kept = service_environment(shell, tmp_path)
    assert kept.keys() - {"PYTHONPATH", "PYTHONSAFEPATH"} == {*PASSED_ON, "MACPIPE_HOME"}
    assert kept["MACPIPE_HOME"] == str(tmp_path)
