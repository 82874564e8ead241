"""Services under systemd: units in the user's own manager, and systemctl."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.core.errors import MacpipeError
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
_TARGET = "default.target"
_NO_BUS = "Failed to connect to"
"""How systemctl begins to say that the user's manager does not run, as in a session of ssh, su or a container."""
_GET_MANAGER = "log in at the desktop or run `loginctl enable-linger USER`, then try again"


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
        try:
            self._order("daemon-reload")
            self._order("enable", unit_name(definition.daemon))
        except MacpipeError as error:
            left = f"{self.definition_path(definition.daemon)} is written but not enabled"
            remedy = f"`macpipe service uninstall {definition.daemon}` removes it"
            raise MacpipeError(f"{error.sentence}; {left}, and {remedy}") from None

    def uninstall(self, daemon: str) -> str:
        """Stop and disable the unit, and remove it. Return why systemd could not be told."""
        why = ""
        try:
            require_success(self._run, *_SYSTEMCTL, "disable", "--now", unit_name(daemon))
            self._remove(daemon)
            require_success(self._run, *_SYSTEMCTL, "daemon-reload")
        except MacpipeError as error:
            why = error.sentence
            self._remove(daemon)
        return why

    def _remove(self, daemon: str) -> None:
        """Remove the unit, and the link that enables it."""
        (self._folder / f"{_TARGET}.wants" / unit_name(daemon)).unlink(missing_ok=True)
        self.definition_path(daemon).unlink(missing_ok=True)

    def start(self, daemon: str) -> None:
        """Start the unit, or restart it with its current definition."""
        self._order("restart", unit_name(daemon))

    def stop(self, daemon: str) -> None:
        """Stop the unit."""
        self._order("stop", unit_name(daemon))

    def _order(self, *words: str) -> None:
        """Run systemctl. Raise MacpipeError if it fails; where the user has no manager, it says how to get one."""
        require_success(self._run, *_SYSTEMCTL, *words, advice={_NO_BUS: _GET_MANAGER})

    def state(self, daemon: str) -> ServiceState:
        """Return the unit's state."""
        names = "--property=LoadState,ActiveState,MainPID,ExecMainCode,ExecMainStatus"
        done = self._run(*_SYSTEMCTL, "show", unit_name(daemon), names)
        return ServiceState(loaded=False) if done.status else parse_properties(done.output)

    def log_path(self, daemon: str) -> str:
        """Return the log file that the unit names. Raises as ``read_log_path`` does."""
        return read_log_path(self.definition_path(daemon))


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
        f"[Install]\nWantedBy={_TARGET}\n"
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
