"""``macpipe config show``: prints the options with which a daemon would start, and where each comes from."""

from __future__ import annotations

import json as json_text
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cluster.cli.config_file import TABLES, is_settable, key_of
from cluster.cli.help import Command
from cluster.cli.options import Json
from cluster.core.errors import InvalidOption

SOURCES: Final = {
    "COMMANDLINE": "command line",
    "ENVIRONMENT": "environment",
    "DEFAULT_MAP": "file",
    "DEFAULT": "default",
}
config = typer.Typer(name="config", help="Check the options of a daemon.", no_args_is_help=True)


@config.command(cls=Command, context_settings={"allow_extra_args": True})
def show(
    ctx: typer.Context,
    daemon: Annotated[str, typer.Argument(metavar="DAEMON", help="worker or serve.")],
    file: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A TOML file with its options.")] = None,
    json: Json = False,
) -> None:
    """Print the options of worker or serve, and where each comes from.

    Nothing is started. Options after -- count as given on the command line.
    """
    parsed = parse_daemon_options(ctx, daemon, [*(["--config", str(file)] if file else []), *ctx.args])
    settable = [one for one in parsed.command.params if is_settable(one)]
    shown = [(key_of(one), *_value_and_source(parsed, str(one.name))) for one in settable]
    if json:
        from cluster.cli.json_output import print_json

        print_json({"options": {key: {"value": value, "source": source} for key, value, source in shown}})
        return
    sys.stdout.write(f"[{daemon}]\n")
    for key, value, source in shown:
        is_set = bool(value) or isinstance(value, bool | int | float)
        sys.stdout.write(f"{key} = {_as_toml(value)}  # {source}\n" if is_set else f"# {key} is not set\n")


def check_daemon(daemon: str) -> None:
    """Raise InvalidOption for anything but a daemon's name."""
    if daemon not in TABLES:
        raise InvalidOption(f"unknown daemon {daemon[:64]}; give worker or serve", field="daemon")


def parse_daemon_options(ctx: typer.Context, daemon: str, arguments: list[str]) -> typer.Context:
    """Parse the command line of ``macpipe worker`` or ``macpipe serve`` without running it.

    Raise InvalidOption for another daemon, and the parser's usage errors for wrong arguments.
    """
    check_daemon(daemon)
    root: Any = ctx.find_root()
    parsed: typer.Context = root.command.commands[daemon].make_context(daemon, list(arguments), parent=root)
    return parsed


def _value_and_source(parsed: typer.Context, name: str) -> tuple[Any, str]:
    source = parsed.get_parameter_source(name)
    value = parsed.params.get(name)
    if name == "model" and isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, Enum):
        value = value.value
    return (str(value) if isinstance(value, Path) else value), SOURCES[source.name if source else "DEFAULT"]


def _as_toml(value: object) -> str:
    """Return a text, number, boolean or list of texts as TOML, which writes these as JSON does."""
    return json_text.dumps(value, ensure_ascii=False)
