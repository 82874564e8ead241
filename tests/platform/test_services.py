"""What launchd and systemd are given, and what is read from their answers. Neither is started here."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.core.errors import MacpipeError
from cluster.platform import launchd, systemd
from cluster.platform.launchd import Launchd, parse_list, property_list
from cluster.platform.services import Finished, ServiceDefinition, ServiceState, run_command
from cluster.platform.systemd import Systemd, parse_properties, unit_text

HARD_WORDS = ('a "quoted" \\ word', "$HOME ${HOME}", "%h 100%", "", "two\nlines", "ü")

# Written from documentation (launchctl(1), "list LABEL"), with the layout that macOS 14 and later print.
RUNNING = """{
	"StandardOutPath" = "/Volumes/data/macpipe/logs/worker.log";
	"LimitLoadToSessionType" = "Aqua";
	"Label" = "macpipe.worker";
	"OnDemand" = false;
	"LastExitStatus" = 256;
	"PID" = 4711;
	"Program" = "/opt/homebrew/bin/macpipe";
	"ProgramArguments" = (
		"/opt/homebrew/bin/macpipe";
		"worker";
	);
};
"""


def definition(folder: Path, *command: str) -> ServiceDefinition:
    program = shutil.which("true") or "true"
    return ServiceDefinition("worker", (program, *command), {"A": "1 2", "B": "%h"}, folder, folder / "logs 1%.log")


class Commands:
    """Records commands, and answers each with the next of ``answers``, the last one again and again."""

    def __init__(self, *answers: Finished) -> None:
        self.given: list[tuple[str, ...]] = []
        self._answers = list(answers)

    def __call__(self, *command: str) -> Finished:
        self.given.append(command)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def test_a_property_list_is_what_launchd_documents(tmp_path: Path) -> None:
    commands = Commands(Finished(0, ""))
    manager = Launchd(tmp_path / "LaunchAgents", commands)
    wanted = definition(tmp_path, *HARD_WORDS)
    manager.install(wanted)
    written = plistlib.loads(manager.definition_path("worker").read_bytes())
    assert written == property_list(wanted)
    assert manager.definition_path("worker").name == f"{written['Label']}.plist"
    assert (written["ProcessType"], written["KeepAlive"], written["RunAtLoad"]) == ("Interactive", True, True)
    assert written["ProgramArguments"] == list(wanted.command)
    assert written["EnvironmentVariables"] == {"A": "1 2", "B": "%h"}
    assert launchd.read_log_path(manager.definition_path("worker")) == str(wanted.log)
    assert commands.given == [], "nothing is started"


def test_launchd_state_is_read() -> None:
    assert parse_list(RUNNING) == ServiceState(loaded=True, pid=4711, exit_status=1)
    ended = RUNNING.replace('\t"PID" = 4711;\n', "").replace("256", "9")
    assert parse_list(ended) == ServiceState(loaded=True, pid=0, exit_status=137)
    assert parse_list("") == ServiceState(loaded=True)
    missing = Commands(Finished(113, 'Could not find service "macpipe.worker" in domain for port'))
    assert Launchd(Path("agents"), missing).state("worker") == ServiceState(loaded=False)


def test_an_agent_is_loaded_anew_only_once_it_has_ended(tmp_path: Path) -> None:
    """`bootout` returns while the worker still moves its layers away, and `bootstrap` would then fail."""
    commands = Commands(
        Finished(0, RUNNING),
        Finished(36, "Boot-out failed: 36: Operation now in progress"),
        Finished(0, RUNNING),
        Finished(113, ""),
        Finished(0, ""),
    )
    pauses: list[float] = []
    Launchd(tmp_path, commands, pauses.append).start("worker")
    assert [command[1] for command in commands.given] == ["list", "bootout", "list", "list", "bootstrap"]
    domain = f"gui/{os.getuid()}"
    assert commands.given[1][2] == f"{domain}/macpipe.worker"
    assert commands.given[-1][2:] == (domain, str(tmp_path / "macpipe.worker.plist"))
    assert len(pauses) == 1


def test_a_failed_command_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    commands = Commands(Finished(113, ""), Finished(5, "Bootstrap failed: 5: Input/output error\n"))
    with pytest.raises(MacpipeError, match=r"launchctl bootstrap .* failed: Bootstrap failed: 5"):
        Launchd(tmp_path, commands).start("worker")
    with pytest.raises(MacpipeError, match="is not installed, so macpipe cannot run as a service"):
        run_command("macpipe-no-such-program")


def test_an_agent_is_removed_with_its_list(tmp_path: Path) -> None:
    manager = Launchd(tmp_path, Commands(Finished(113, "")))
    manager.install(definition(tmp_path))
    assert not manager.uninstall("worker")
    assert not manager.definition_path("worker").exists()


def test_a_definition_is_removed_although_its_manager_cannot_be_told(tmp_path: Path) -> None:
    agents = Launchd(tmp_path, Commands(Finished(0, RUNNING), Finished(5, "Boot-out failed: 5: Input/output error")))
    agents.install(definition(tmp_path))
    assert "Boot-out failed: 5" in agents.uninstall("worker")
    assert not agents.definition_path("worker").exists()
    refused = Commands(Finished(0, ""), Finished(0, ""), Finished(1, "Failed to connect to bus: No medium found"))
    units = Systemd(tmp_path / "user", refused)
    units.install(definition(tmp_path))
    enabled = tmp_path / "user" / "default.target.wants" / "macpipe-worker.service"
    enabled.parent.mkdir()
    enabled.symlink_to(units.definition_path("worker"))
    assert "No medium found" in units.uninstall("worker")
    assert not enabled.is_symlink()
    assert not units.definition_path("worker").exists()
    with pytest.raises(MacpipeError, match="No medium found; log in at the desktop or run `loginctl enable-linger"):
        units.start("worker")
    with pytest.raises(MacpipeError, match=r"macpipe-worker\.service is written but not enabled, and `macpipe service"):
        units.install(definition(tmp_path))


def test_a_unit_is_enabled_and_removed(tmp_path: Path) -> None:
    commands = Commands(Finished(0, ""))
    manager = Systemd(tmp_path / "user", commands)
    manager.install(definition(tmp_path))
    assert systemd.read_log_path(manager.definition_path("worker")) == str(tmp_path / "logs 1%.log")
    manager.start("worker")
    manager.stop("worker")
    manager.uninstall("worker")
    verbs = [command[2] for command in commands.given]
    assert verbs == ["daemon-reload", "enable", "restart", "stop", "disable", "daemon-reload"]
    assert all(command[:2] == ("systemctl", "--user") for command in commands.given)
    assert not manager.definition_path("worker").exists()


@pytest.mark.parametrize(
    ("properties", "state"),
    [
        ("MainPID=311\nExecMainCode=0\nExecMainStatus=0\nLoadState=loaded\nActiveState=active\n", (True, 311, None)),
        ("MainPID=0\nExecMainCode=1\nExecMainStatus=2\nLoadState=loaded\nActiveState=activating\n", (True, 0, 2)),
        ("MainPID=0\nExecMainCode=2\nExecMainStatus=9\nLoadState=loaded\nActiveState=failed\n", (True, 0, 137)),
        ("MainPID=0\nExecMainCode=0\nExecMainStatus=0\nLoadState=not-found\n", (False, 0, None)),
    ],
)
def test_systemd_state_is_read(properties: str, state: tuple[bool, int, int | None]) -> None:
    """The properties are those of `systemctl --user show` of systemd 252."""
    assert parse_properties(properties) == ServiceState(*state)


def test_a_unit_escapes_what_systemd_expands(tmp_path: Path) -> None:
    command = next(x for x in unit_text(definition(tmp_path, *HARD_WORDS)).splitlines() if x.startswith("ExecStart="))
    assert command.endswith(r'"a \"quoted\" \\ word" "$$HOME $${HOME}" "%%h 100%%" "" "two\nlines" "ü"')


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Only its form is verified: the unit is not started."""
    unit = tmp_path / "macpipe-worker.service"
    unit.write_text(unit_text(definition(tmp_path, *HARD_WORDS)))
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(run)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0
    assert unit.name not in done.stderr, "other units of this machine may have faults of their own"
