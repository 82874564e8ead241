"""``macpipe service``: runs a worker or a coordinator in the background, under launchd or systemd."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.config import check_daemon, parse_daemon_options
from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Home, Json
from cluster.core.errors import MacpipeError
from cluster.platform.paths import HOME_VARIABLE, absolute_path, state_home

if TYPE_CHECKING:
    from cluster.platform.services import ServiceManager, ServiceState

service = typer.Typer(name="service", help="Run a worker or serve in the background.", no_args_is_help=True)
Daemon = Annotated[str, typer.Argument(metavar="DAEMON", help="worker or serve.")]
PASSED_ON: Final = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MACPIPE_CLUSTER", "MACPIPE_LOG_LEVEL")
"""Variables of the shell that a service keeps. Secrets such as HF_TOKEN are not written into its definition."""
LOCAL_NETWORK: Final = (
    "macOS lets a background process reach other Macs only if System Settings > Privacy & Security > Local Network "
    "allows it; if the log says `No route to host`, allow it there and start the service again"
)
LINGER: Final = "to keep it running while nobody is logged in: loginctl enable-linger"


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """A service as JSON. ``pid`` is 0 if it is not running; ``exit_status`` is null if it has not ended."""

    daemon: str
    installed: bool
    loaded: bool
    pid: int
    exit_status: int | None
    definition: str
    log: str


@service.command(cls=Command, context_settings={"allow_extra_args": True})
def install(ctx: typer.Context, daemon: Daemon, home: Home = None) -> None:
    """Define a service that starts when you log in.

    It is restarted whenever it ends. Options after -- are those of `macpipe worker` or `macpipe serve`, for example
    --config FILE. They are checked now. Installing again replaces the definition.
    """
    from cluster.platform.private_files import make_private_folder, not_written
    from cluster.platform.services import ServiceDefinition

    manager = service_manager()
    arguments = parse_daemon_options(ctx, daemon, ctx.args).params
    chosen = state_home(home or arguments.get("home"))
    log = arguments.get("log_file") or log_path(chosen, daemon)
    command = (*own_command(), daemon, *ctx.args, *(() if arguments.get("log_file") else ("--log-file", str(log))))
    environment = service_environment(os.environ, chosen)
    definition = ServiceDefinition(daemon, command, environment, Path.cwd(), absolute_path(log))
    path = manager.definition_path(daemon)
    try:
        if not definition.log.parent.exists():  # one that exists may be the user's own: its mode stays
            make_private_folder(definition.log.parent)
        manager.install(definition)
    except OSError as e:
        raise not_written(e, path, "the service", "check who owns that folder") from None
    sys.stdout.write(f"defined in {path}\nlogs to {definition.log}\n")
    sys.stdout.write(f"start it now with `macpipe service start {daemon}`; it also starts at each login\n")
    sys.stderr.write(f"{LOCAL_NETWORK if sys.platform == 'darwin' else LINGER}\n")


@service.command(cls=Command)
def uninstall(daemon: Daemon) -> None:
    """Stop a service and remove its definition. Its log and state stay."""
    manager = installed_manager(daemon)
    path = manager.definition_path(daemon)
    try:
        untold = manager.uninstall(daemon)
    except OSError as e:
        raise MacpipeError(f"cannot remove {path}: {e.strerror}; check who owns that folder, then try again") from None
    sys.stdout.write(f"removed {path}\n")
    if untold:
        sys.stderr.write(f"the service manager could not be told: {untold}; {daemon} may run until you log out\n")


@service.command(cls=Command)
def start(daemon: Daemon) -> None:
    """Start a service, or restart it with its current definition."""
    installed_manager(daemon).start(daemon)
    sys.stdout.write(f"started; `macpipe service logs {daemon}` shows what it does\n")


@service.command(cls=Command)
def stop(daemon: Daemon) -> None:
    """Stop a service until it is started, or until the next login."""
    installed_manager(daemon).stop(daemon)
    sys.stdout.write("stopped\n")


@service.command(cls=Command)
def status(daemon: Daemon, json: Json = False) -> None:
    """Show whether a service is installed and runs. Exits with 1 if it does not run."""
    with errors_in_json(json):
        manager = service_manager()
        check_daemon(daemon)
        path = manager.definition_path(daemon)
        found = manager.state(daemon)
        log = installed_log(manager, daemon) if path.exists() else ""
        if json:
            from cluster.cli.json_output import print_json

            print_json(ServiceFacts(daemon, path.exists(), found.loaded, found.pid, found.exit_status, str(path), log))
        else:
            sys.stdout.write(f"{describe(daemon, path, found)}\n{f'log: {log}' if log else ''}".rstrip() + "\n")
    if not found.pid:
        raise typer.Exit(1)


@service.command(cls=Command)
def logs(
    daemon: Daemon,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, metavar="N", help="Show this many last lines.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are added, until Ctrl-C.")] = False,
) -> None:
    """Show the end of a service's log."""
    log = Path(installed_log(installed_manager(daemon), daemon))
    if not log.exists():
        raise MacpipeError(f"there is no log {log} yet; start the service with `macpipe service start {daemon}`")
    sys.stdout.flush()
    # -F goes on with the new file when the log is rotated.
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), str(log)])  # noqa: S606


def service_manager() -> ServiceManager:
    """Return this system's service manager."""
    if sys.platform == "darwin":
        from cluster.platform.launchd import Launchd

        return Launchd()
    from cluster.platform.systemd import Systemd

    return Systemd()


def installed_manager(daemon: str) -> ServiceManager:
    """Return the service manager. Raise MacpipeError if it has no such service."""
    check_daemon(daemon)
    manager = service_manager()
    if not manager.definition_path(daemon).exists():
        raise MacpipeError(f"the service {daemon} is not installed; run `macpipe service install {daemon}`")
    return manager


def log_path(home: Path, daemon: str) -> Path:
    """Return the log file of a daemon that runs as a service."""
    return home / "logs" / f"{daemon}.log"


def installed_log(manager: ServiceManager, daemon: str) -> str:
    """Return the log file that an installed definition names. Raise MacpipeError if it names none."""
    try:
        return manager.log_path(daemon)
    except (OSError, ValueError, KeyError) as e:
        path = manager.definition_path(daemon)
        raise MacpipeError(
            f"cannot read {path}: {e}; define the service again with `macpipe service install`"
        ) from None


def describe(daemon: str, path: Path, found: ServiceState) -> str:
    """Return one line about a service."""
    if not path.exists():
        return f"{daemon}: not installed"
    if found.pid:
        return f"{daemon}: running (pid {found.pid})"
    ended = "" if found.exit_status is None else f"; its last run ended with status {found.exit_status}"
    return f"{daemon}: {'loaded but not running' if found.loaded else 'not running'}{ended}"


def own_command() -> tuple[str, ...]:
    """Return how to start macpipe again from any folder: by its script if that was used, else by its Python.

    Links of the script are kept, because an upgrade may move what they point to.
    """
    script = shutil.which(sys.argv[0]) if Path(sys.argv[0]).name == "macpipe" else None
    return (str(absolute_path(Path(script))),) if script else (sys.executable, "-m", "cluster")


def service_environment(shell: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the variables that a service gets. Python imports nothing from the folder that it runs in."""
    from cluster.platform.process import isolated_environment

    kept = {name: shell[name] for name in PASSED_ON if shell.get(name)}
    return isolated_environment(kept | {HOME_VARIABLE: str(home)})
