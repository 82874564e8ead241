"""``macpipe models list|add|remove``: shows and edits the file that ``macpipe serve --models`` reads."""

from __future__ import annotations

import json as json_text
import stat
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.models_toml import HEADER, describe_models, parse_models
from cluster.cli.options import Json
from cluster.coordinator.models_file import ModelsFile
from cluster.core.errors import InvalidOption, ModelNotFound

models = typer.Typer(name="models", help="List, add and remove models in the file of serve.", no_args_is_help=True)
File = Annotated[Path, typer.Option("--models", metavar="FILE", help="The file that `macpipe serve --models` reads.")]
DEFAULT_FILE: Final = Path("models.toml")


@models.command("list", cls=Command)
def list_models(file: File = DEFAULT_FILE, json: Json = False) -> None:
    """List the models of a file, the default one first.

    `macpipe status` shows which of them are loaded.
    """
    with errors_in_json(json):
        text = _open(file).read_text()
        if json:
            from cluster.cli.json_output import print_json

            print_json({"models": describe_models(file, text)})
            return
        from cluster.cli.screen import console, printable, table

        shown = table("model", "source", "aliases", "pinned", "replicas", "fallback")
        for entry in parse_models(file, {}, (), text):
            shown.add_row(
                printable(entry.name),
                printable(entry.order.model),
                printable(", ".join(entry.aliases)) or "-",
                "yes" if entry.pin else "no",
                str(entry.replicas or "auto"),
                printable(entry.fallback) or "-",
            )
        console(sys.stdout).print(shown)


@models.command(cls=Command)
def add(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face id, a folder, or faq.")],
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What requests call it.", show_default="its id, or the folder's name")
    ] = "",
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name; * stands for any characters. Repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another key of the file, like pin=true. Repeatable."),
    ] = None,
    file: File = DEFAULT_FILE,
) -> None:
    """Add a model at the end of a file, which is made if there is none.

    A coordinator that reads the file takes it up within seconds. Comments stay.
    """
    before = _open(file).read_text() if file.exists() else ""
    here = Path(source).expanduser()
    table = {"name": name, "source": str(here.absolute()) if here.is_dir() else source, "aliases": alias or []}
    lines = [f"{key} = {_as_toml(value)}" for key, value in table.items() if value]
    lines += map(_parse_setting, settings or ())
    after = "\n".join([*([before.rstrip("\n"), ""] if before.strip() else []), "[[model]]", *lines, ""])
    added = parse_models(file, {}, (), after)[-1]
    _write(file, after)
    sys.stdout.write(f"added {added.name} to {file}\n")


@models.command(cls=Command)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, as `models list` shows it.")],
    file: File = DEFAULT_FILE,
) -> None:
    """Remove a model from a file.

    If it is loaded, it goes on until it is unloaded. Comments of other models stay.
    """
    before = _open(file).read_text()
    entries = parse_models(file, {}, (), before)
    kept = tuple(entry for entry in entries if entry.name != name)
    if owner := next((entry for entry in kept if name in entry.aliases), None):
        raise ModelNotFound(f"{name[:64]} is an alias of {owner.name} in {file}; edit its aliases there", field="name")
    if len(kept) == len(entries):
        names = ", ".join(entry.name for entry in entries)
        raise ModelNotFound(f"{file} has no model {name[:64]}; its models are {names}", field="name")
    if not kept:
        raise InvalidOption(f"{name} is the only model of {file}, which must name one; add another one first")
    index = next(i for i, entry in enumerate(entries) if entry.name == name)
    after = _without_table(before, index)
    if parse_models(file, {}, (), after) != kept:
        raise InvalidOption(f"cannot find the lines of {name} in {file}; remove them in an editor")
    _write(file, after)
    sys.stdout.write(f"removed {name} from {file}\n")


def _open(file: Path) -> ModelsFile:
    return ModelsFile(file, lambda text: parse_models(file, {}, (), text))


def _as_toml(value: object) -> str:
    """Return a text or a list of texts as TOML, which writes these as JSON does."""
    return json_text.dumps(value, ensure_ascii=False)


def _parse_setting(written: str) -> str:
    """Return a line of TOML for ``KEY=VALUE``. A value that is no TOML is a text. Raise InvalidOption."""
    key, equals, value = (part.strip() for part in written.partition("="))
    if not (key.replace("-", "").replace("_", "").isalnum() and equals and value):
        raise InvalidOption(f"--set is {written[:80]!r}; write it as KEY=VALUE, for example pin=true", field="set")
    try:
        tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        return f"{key} = {_as_toml(value)}"
    return f"{key} = {value}"


def _without_table(text: str, index: int) -> str:
    """Return the text of a file without one of its tables, and without the comment right above that, if any."""
    lines = text.splitlines(keepends=True)
    headers = [i for i, line in enumerate(lines) if HEADER.match(line)]
    starts = [_comment_above(lines, header) for header in headers]
    end = starts[index + 1] if index + 1 < len(starts) else len(lines)
    return "".join([*lines[: starts[index]], *lines[end:]])


def _comment_above(lines: list[str], header: int) -> int:
    """Return where the comment right above a header begins. One at the start of the file belongs to the file."""
    start = header
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return start or header


def _write(file: Path, text: str) -> None:
    """Write a file whole, or leave what is there. Raise MacpipeError."""
    from cluster.platform.private_files import not_written, replace_file

    place = file.expanduser().resolve()
    try:
        mode = place.stat().st_mode if place.exists() else None
        replace_file(place, text.encode())
        if mode is not None:
            place.chmod(stat.S_IMODE(mode))
    except OSError as error:
        raise not_written(error, place, "the file of models") from None
