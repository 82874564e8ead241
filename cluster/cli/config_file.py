"""Options of a daemon in a TOML file: a table for each command, with the names that the command line has.

The values become defaults of the command's own parser. So the file has the same types, ranges and errors as the command
line, which overrides it, as environment variables do. A settings class, as of pydantic-settings, would declare every
option a second time, beside the parser, with errors of its own, and each new option could be forgotten there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer import BadParameter

from cluster.cli.usage_errors import explain_bad_value
from cluster.core.errors import InvalidOption
from cluster.platform.private_files import open_regular_file

TABLES: Final = ("worker", "serve")
MAX_BYTES: Final = 2**20
_NOT_IN_FILE: Final = frozenset({"config", "help"})


def apply_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the command's defaults, and return ``path``. Raise InvalidOption for a wrong file."""
    if path is not None:
        ctx.default_map = read_options(path, ctx)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=apply_config,
        help="Take options from this TOML file; the command line and variables override it.",
    ),
]


def read_options(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """Return the values of the file's table for the command of ``ctx``, by parameter name. Raise InvalidOption."""
    tables = _read_tables(path)
    command = str(ctx.info_name)
    known = {key_of(one): one for one in ctx.command.params if is_settable(one)}
    values: dict[str, Any] = {}
    for key, value in tables.get(command, {}).items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise InvalidOption(f"{path}: unknown option {command}.{key}{_suggestion(key, known)}", field=key)
        given = [value] if _is_list_argument(option) and isinstance(value, str) else value
        check_value(f"{path}: {command}.{key}", option, given, ctx)
        values[str(option.name)] = given
    return values


def is_settable(option: Any) -> bool:
    """Return whether a file may set this parameter."""
    return option.name not in _NOT_IN_FILE and not getattr(option, "hidden", False)


def _is_list_argument(option: Any) -> bool:
    return getattr(option, "nargs", 1) == -1


def key_of(option: Any) -> str:
    """Return the parameter's key in a file, such as ``max-context``."""
    return str(option.name).replace("_", "-")


def _read_tables(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        with open_regular_file(path.expanduser().resolve()) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InvalidOption(f"{path} has more than {MAX_BYTES} bytes; give a smaller file to --config")
        found = tomllib.loads(content.decode())
    except OSError as e:
        raise InvalidOption(f"cannot read {path}: {e.strerror}; give a readable file to --config") from None
    except (ValueError, RecursionError) as e:
        raise InvalidOption(f"{path} is not valid TOML: {str(e) or 'nested too deeply'}; correct it") from None
    for name, table in found.items():
        if name not in TABLES or not isinstance(table, dict):
            raise InvalidOption(f"{path}: unknown entry {name}; write options below [worker] or [serve]")
    return found


def _suggestion(key: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(key.replace("_", "-"), known, n=1)
    return f"; did you mean {close[0]}?" if close else "; `macpipe worker --help` and `serve --help` list options"


def check_value(place: str, option: Any, value: object, ctx: typer.Context) -> None:
    """Raise InvalidOption if ``value`` has another type than the option, or is out of range."""
    wanted = _wanted_type(option, value)
    if not wanted:
        try:
            option.process_value(ctx, value)
        except BadParameter as error:
            error.param = option
            explain_bad_value(error)
            wanted = error.message
    if wanted:
        raise InvalidOption(f"{place}: {wanted}", field=str(option.name))


def _wanted_type(option: Any, value: object) -> str:
    """Return what is wrong with the type of ``value``; empty if the option can parse it."""
    if getattr(option, "multiple", False) or _is_list_argument(option):
        right = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return "" if right else "give a list of texts, like ['a', 'b']"
    if getattr(option, "is_flag", False):
        return "" if isinstance(value, bool) else "give true or false"
    return "" if isinstance(value, str | int | float) and not isinstance(value, bool) else "give a text or a number"
