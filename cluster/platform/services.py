"""Background services of a user, as launchd and systemd run them: what both have in common."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from cluster.core.errors import MacpipeError

COMMAND_TIMEOUT_S: Final = 60.0
"""Time limit of launchctl and systemctl. Stopping waits until the daemon has moved its layers away."""
RESTART_S: Final = 10
"""Seconds between a daemon's end and its next start. launchd waits at least as long by default."""


STOP_S: Final = 45
"""Seconds that a daemon gets to end by itself; a worker moves its layers away first (``DRAIN_S``)."""


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """A daemon as a service: its command line, what it adds to the environment, and where it runs and logs."""

    daemon: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log: Path


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the service manager says. ``pid`` is 0 if the daemon is not running.

    ``exit_status`` is the last one, above 128 after a signal; None if the daemon has not ended or it is not known.
    """

    loaded: bool
    pid: int = 0
    exit_status: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A command's exit status and output."""

    status: int
    output: str


RunCommand = Callable[..., Finished]
"""Runs a command given as strings."""


class ServiceManager(Protocol):
    """Runs one service for each daemon. Every method may raise MacpipeError."""

    def definition_path(self, daemon: str) -> Path:
        """Return the file that defines the service."""

    def install(self, definition: ServiceDefinition) -> None:
        """Write the definition. The service starts at the next login, or with ``start``."""

    def uninstall(self, daemon: str) -> str:
        """Stop the service and remove its definition, even where the manager cannot be told.

        Return why it could not be told; "" if it was. Raise OSError if the definition cannot be removed.
        """

    def start(self, daemon: str) -> None:
        """Start the service."""

    def stop(self, daemon: str) -> None:
        """Stop the service until it is started or the user logs in again."""

    def state(self, daemon: str) -> ServiceState:
        """Return the service's state."""

    def log_path(self, daemon: str) -> str:
        """Return the log file that the definition names. Raise OSError, ValueError or KeyError if it names none."""


def run_command(*command: str) -> Finished:
    """Run a command to its end and return its status and output. Raise MacpipeError if it cannot run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise MacpipeError(f"{command[0]} is not installed, so macpipe cannot run as a service here") from None
    except subprocess.TimeoutExpired:
        raise MacpipeError(f"`{' '.join(command)}` took longer than {COMMAND_TIMEOUT_S:g} s; try again") from None
    return Finished(done.returncode, done.stdout)


def require_success(run: RunCommand, *command: str, advice: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a command. Raise MacpipeError with its output if it fails.

    ``advice``: what to do, by a part of the output; it is added to the sentence.
    """
    done = run(*command)
    if done.status:
        why = " ".join(done.output.split())[:300] or f"exit status {done.status}"
        remedies = "".join(f"; {remedy}" for part, remedy in advice.items() if part in done.output)
        raise MacpipeError(f"`{' '.join(command)}` failed: {why}{remedies}")
