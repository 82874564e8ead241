"""Services under launchd: property lists in ~/Library/LaunchAgents, and launchctl."""

from __future__ import annotations

import os
import plistlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

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

_IN_PROGRESS: Final = 36
"""Exit status of bootout while the agent is still ending: EINPROGRESS of macOS."""
_UNLOAD_S: Final = 5.0
_POLL_S: Final = 0.2
_PID: Final = re.compile(r'^\s*"PID" = (\d{1,9});$', re.MULTILINE)
_LAST_STATUS: Final = re.compile(r'^\s*"LastExitStatus" = (\d{1,9});$', re.MULTILINE)


class Launchd:
    """Agents of the logged-in user. ``run`` and ``sleep`` replace the commands and the clock in tests."""

    def __init__(
        self,
        folder: Path | None = None,
        run: RunCommand = run_command,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = folder or Path.home() / "Library" / "LaunchAgents"
        self._run = run
        self._sleep = sleep
        self._domain = f"gui/{os.getuid()}"

    def definition_path(self, daemon: str) -> Path:
        """Return the path of the property list."""
        return self._folder / f"{label_of(daemon)}.plist"

    def install(self, definition: ServiceDefinition) -> None:
        """Write the property list. launchd reads it at the next login, or when the service is started."""
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.definition_path(definition.daemon), plistlib.dumps(property_list(definition)))

    def uninstall(self, daemon: str) -> str:
        """Unload the agent if it is loaded, and remove its property list. Return why it could not be unloaded."""
        why = ""
        try:
            self.stop(daemon)
        except MacpipeError as error:
            why = error.sentence
        self.definition_path(daemon).unlink(missing_ok=True)
        return why

    def start(self, daemon: str) -> None:
        """Load the agent anew, so that launchd reads the current property list; it starts at once."""
        self.stop(daemon)
        require_success(self._run, "launchctl", "bootstrap", self._domain, str(self.definition_path(daemon)))

    def stop(self, daemon: str) -> None:
        """Unload the agent if it is loaded, and wait until it has ended. Raise MacpipeError if it does not.

        KeepAlive would restart an agent that merely got a signal.
        """
        if not self.state(daemon).loaded:
            return
        target = f"{self._domain}/{label_of(daemon)}"
        done = self._run("launchctl", "bootout", target)
        if done.status not in (0, _IN_PROGRESS):
            raise MacpipeError(f"`launchctl bootout {target}` failed: {' '.join(done.output.split())[:300]}")
        until = time.monotonic() + STOP_S + _UNLOAD_S
        while self.state(daemon).loaded:
            if time.monotonic() > until:
                raise MacpipeError(f"launchd has not ended {label_of(daemon)}; see `launchctl print {target}`")
            self._sleep(_POLL_S)

    def state(self, daemon: str) -> ServiceState:
        """Return the agent's state."""
        done = self._run("launchctl", "list", label_of(daemon))
        return ServiceState(loaded=False) if done.status else parse_list(done.output)

    def log_path(self, daemon: str) -> str:
        """Return the log file that the property list names. Raises as ``read_log_path`` does."""
        return read_log_path(self.definition_path(daemon))


def label_of(daemon: str) -> str:
    return f"macpipe.{daemon}"


def property_list(definition: ServiceDefinition) -> dict[str, Any]:
    """Return the keys of launchd.plist(5) for a service.

    Without ``Interactive``, launchd limits an agent's processor and disk use, and decoding is several times slower.
    """
    return {
        "Label": label_of(definition.daemon),
        "ProgramArguments": list(definition.command),
        "EnvironmentVariables": dict(definition.environment),
        "WorkingDirectory": str(definition.folder),
        "StandardOutPath": str(definition.log),
        "StandardErrorPath": str(definition.log),
        "ProcessType": "Interactive",
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": RESTART_S,
        "ExitTimeOut": STOP_S,
    }


def parse_list(output: str) -> ServiceState:
    """Parse ``launchctl list LABEL`` of a loaded agent. Its last exit status is that of wait(2)."""
    pid, last = _PID.search(output), _LAST_STATUS.search(output)
    code = os.waitstatus_to_exitcode(int(last[1]) & 0xFFFF) if last and int(last[1]) & 0xFF != 0x7F else None
    status = code if code is None or code >= 0 else 128 - code
    return ServiceState(loaded=True, pid=int(pid[1]) if pid else 0, exit_status=status)


def read_log_path(path: Path) -> str:
    """Return the log file that a property list names. Raises OSError, ValueError or KeyError."""
    return str(plistlib.loads(path.read_bytes())["StandardErrorPath"])
