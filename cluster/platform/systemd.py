"""Services under systemd: units in the user's own manager, and systemctl."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.platform.private_files import replace_file
from cluster.platform.services import (
    RESTART_S,
    STOP_S,
    RunCommand,
    ServiceDefinition,
    ServiceState,
    require_success,
    run_command,
)

_SYSTEMCTL = ("systemctl", "--user")


class Systemd:
    """Units of the user's manager. ``run`` replaces the commands in tests."""

    def __init__(self, folder: Path | None = None, run: RunCommand = run_command) -> None:
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self._folder = folder or settings / "systemd" / "user"
        self._run = run

    def definition_path(self, daemon: str) -> Path:
        """Return the path of the unit."""
        return self._folder / unit_name(daemon)

    def install(self, definition: ServiceDefinition) -> None:
        """Write the unit and enable it, so that it starts with the user's manager."""
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.definition_path(definition.daemon), unit_text(definition).encode())
        require_success(self._run, *_SYSTEMCTL, "daemon-reload")
        require_success(self._run, *_SYSTEMCTL, "enable", unit_name(definition.daemon))

    def uninstall(self, daemon: str) -> None:
        """Stop and disable the unit, and remove it."""
        require_success(self._run, *_SYSTEMCTL, "disable", "--now", unit_name(daemon))
        self.definition_path(daemon).unlink(missing_ok=True)
        require_success(self._run, *_SYSTEMCTL, "daemon-reload")

    def start(self, daemon: str) -> None:
        """Start the unit, or restart it with its current definition."""
        require_success(self._run, *_SYSTEMCTL, "restart", unit_name(daemon))

    def stop(self, daemon: str) -> None:
        """Stop the unit."""
        require_success(self._run, *_SYSTEMCTL, "stop", unit_name(daemon))

    def state(self, daemon: str) -> ServiceState:
        """Return the unit's state."""
        names = "--property=LoadState,ActiveState,MainPID,ExecMainCode,ExecMainStatus"
        done = self._run(*_SYSTEMCTL, "show", unit_name(daemon), names)
        return ServiceState(loaded=False) if done.status else parse_properties(done.output)


def unit_name(daemon: str) -> str:
    return f"macpipe-{daemon}.service"


def unit_text(definition: ServiceDefinition) -> str:
    """Return the unit of a service. It is restarted however it ends, and as often as needed."""
    environment = "".join(f"Environment={_quote(f'{k}={v}')}\n" for k, v in sorted(definition.environment.items()))
    command = " ".join(_quote(word).replace("$", "$$") for word in definition.command)
    log = str(definition.log).replace("%", "%%")
    return (
        f"[Unit]\nDescription=macpipe {definition.daemon}\nStartLimitIntervalSec=0\n\n"
        f"[Service]\nType=exec\nExecStart={command}\n{environment}"
        f"WorkingDirectory={str(definition.folder).replace('%', '%%')}\n"
        f"StandardOutput=append:{log}\nStandardError=append:{log}\n"
        f"Restart=always\nRestartSec={RESTART_S}\nTimeoutStopSec={STOP_S}\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def _quote(word: str) -> str:
    """Return a word that systemd splits, unescapes and expands to exactly ``word``; see systemd.syntax(7)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("%", "%%")
    return f'"{escaped}"'


def parse_properties(output: str) -> ServiceState:
    """Parse ``systemctl show``. ExecMainCode is 1 after an exit, and 2 or 3 after a signal, the status's number."""
    found = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    loaded = found.get("LoadState") == "loaded"
    code, status = _number(found.get("ExecMainCode", "")), _number(found.get("ExecMainStatus", ""))
    ended = (None, status, 128 + status, 128 + status)[code] if 0 <= code <= 3 else None
    return ServiceState(loaded, _number(found.get("MainPID", "")), ended)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def read_log_path(path: Path) -> str:
    """Return the log file that a unit names. Raises OSError or ValueError."""
    begin = "StandardError=append:"
    lines = path.read_text(encoding="utf-8").splitlines()
    found = next((line.removeprefix(begin) for line in lines if line.startswith(begin)), "")
    if not found:
        raise ValueError("it names no log file")
    return found.replace("%%", "%")
