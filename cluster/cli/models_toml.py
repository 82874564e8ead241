"""The models of a coordinator, from the command line or as tables of a TOML file.

A table's options have the names, types, ranges and errors of ``serve``: that command's parser reads them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final

import typer

from cluster.cli.config_file import check_value, is_settable, key_of
from cluster.cli.model_options import model_options
from cluster.cli.options import takes_options
from cluster.coordinator.model_catalog import DEFAULT, MAX_REPLICAS, ModelCatalog, check_entry, public_id
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import InvalidOption
from cluster.core.text import parse_duration

TABLE: Final = "model"
AUTO: Final = "auto"
_OWN_KEYS: Final = ("name", "source", "aliases", "pin", "idle-unload", "replicas", "priority", "fallback")
_FIELDS: Final = {"workers": "worker_count", "adapter": "adapters", "group": "groups", "speculate": "speculation"}
"""Fields of ``LoadOrder`` that have another name than their option."""
HEADER: Final = re.compile(r"\s*\[\[\s*model\s*\]\]")


def require_models(ctx: typer.Context, models: list[str] | None) -> list[str] | None:
    """Return the models of a command line. Raise InvalidOption if it has neither models nor a file of them, or both.

    With --standby it has neither: the leader says what is served.
    """
    file = ctx.params.get("models")
    if ctx.params.get("standby"):
        if models or file:
            raise InvalidOption("a standby serves the models of its leader: name none with --standby", field="model")
        return None
    if models and file:
        raise InvalidOption("models are named on the command line and by --models; give one of both", field="models")
    if not models and not file:
        raise InvalidOption("name at least one model, or a file of models with --models", field="model")
    return models


def name_models(sources: Sequence[str], options: Mapping[str, Any], aliases: Sequence[str]) -> tuple[ModelEntry, ...]:
    """Return the models of a command line, all with the same options. The first gets ``aliases``.

    Raise InvalidOption if two have one name.
    """
    orders = [LoadOrder(model=source, **options) for source in sources]
    names = [public_id(source) for source in sources] if len(sources) > 1 else [DEFAULT]
    entries = [ModelEntry(name, order) for name, order in zip(names, orders, strict=True)]
    entries[0] = ModelEntry(entries[0].name, orders[0], tuple(aliases))
    return ModelCatalog(entries).entries


def parse_models(path: Path, options: Mapping[str, Any], aliases: Sequence[str], text: str) -> tuple[ModelEntry, ...]:
    """Return the models of a file. ``options`` are those of models that set no other; the first gets ``aliases`` too.

    Raise InvalidOption with the file and the line.
    """
    tables = _read_tables(path, text)
    lines = _Lines(path, text, len(tables))
    entries = []
    for i, table in enumerate(tables):
        try:
            entries.append(_parse_entry(path.expanduser().resolve().parent, table, options, aliases if i == 0 else ()))
        except InvalidOption as e:
            raise InvalidOption(f"{lines.place(i, e.field)}: {e.sentence}", field=e.field) from None
    try:
        return ModelCatalog(entries).entries
    except InvalidOption as e:
        about = [i for i, entry in enumerate(entries) if entry.name == e.field]
        place = lines.place(about[-1], e.details.get("key", "")) if about else path
        raise InvalidOption(f"{place}: {e.sentence}", field=e.field) from None


def describe_models(path: Path, text: str) -> list[dict[str, Any]]:
    """Return the models of a file by its keys, each written with _: a model's own keys, and the options that it sets.

    Sources are resolved. Raise InvalidOption as ``parse_models``.
    """
    described = []
    for entry, table in zip(parse_models(path, {}, (), text), _read_tables(path, text), strict=True):
        given = {key.replace("-", "_"): value for key, value in table.items()}
        own = {
            "name": entry.name,
            "source": entry.order.model,
            "aliases": entry.aliases,
            "pin": entry.pin,
            "idle_unload": given.get("idle_unload"),
            "replicas": entry.replicas or AUTO,
            "priority": entry.priority,
            "fallback": entry.fallback,
        }
        described.append({**own, **{key: value for key, value in given.items() if key not in own}})
    return described


def _read_tables(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidOption(f"{path} is not valid TOML: {str(e) or 'nested too deeply'}; correct it") from None
    for name in found:
        if name != TABLE:
            line = next((i for i, line in enumerate(text.splitlines(), 1) if name in line), 1)
            raise InvalidOption(f"{path}:{line}: unknown entry {name[:64]}; begin each model with [[{TABLE}]]")
    tables = found.get(TABLE, [])
    if not tables or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidOption(f"{path}: it names no model; begin each one with [[{TABLE}]]")
    return tables


class _Lines:
    """Finds the lines of a file's tables and keys, for errors. A value of several lines may hide them."""

    def __init__(self, path: Path, text: str, tables: int) -> None:
        self._path, self._lines = path, text.splitlines()
        headers = [i for i, line in enumerate(self._lines) if HEADER.match(line)]
        self._headers = [*headers, len(self._lines)] if len(headers) == tables else []

    def place(self, table: int, key: str = "") -> str:
        """Return ``FILE:LINE`` of a table's key, or of its header if it has none; ``FILE`` if neither is found."""
        if not self._headers:
            return str(self._path)
        first, end = self._headers[table : table + 2]
        spelled = "[-_]".join(map(re.escape, re.split("[-_]", key)))
        pattern = re.compile(rf"""\s*["']?{spelled}["']?\s*=""") if key else None
        found = (i for i in range(first + 1, end) if pattern and pattern.match(self._lines[i]))
        return f"{self._path}:{next(found, first) + 1}"


def _parse_entry(
    folder: Path, table: Mapping[str, Any], options: Mapping[str, Any], aliases: Iterable[str]
) -> ModelEntry:
    """Return one model. Relative folders are below ``folder``. Raise InvalidOption whose field is the key."""
    own = {key.replace("_", "-"): value for key, value in table.items()}
    source = _resolve_source(folder, _text(own, "source", required=True))
    rest = {key: value for key, value in own.items() if key not in _OWN_KEYS}
    entry = ModelEntry(
        name=_text(own, "name") or public_id(source),
        order=LoadOrder(model=source, **{**options, **_parse_options(rest)}),
        aliases=tuple(dict.fromkeys((*_texts(own, "aliases"), *aliases))),
        pin=_boolean(own, "pin"),
        idle_unload_s=parse_duration(_text(own, "idle-unload"), "idle-unload") if "idle-unload" in own else None,
        replicas=_replicas(own),
        priority=_integer(own, "priority"),
        fallback=_text(own, "fallback"),
    )
    entry.order.check()
    return check_entry(entry)


def _resolve_source(folder: Path, source: str) -> str:
    """Return a folder's absolute path; any other source as it is."""
    here = Path(source).expanduser()
    is_folder = source.startswith((".", "~")) or (folder / here).is_dir()
    return str((folder / here).resolve()) if is_folder else source


def _text(table: Mapping[str, Any], key: str, *, required: bool = False) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or (key in table and not value):
        raise InvalidOption(f"{key} must be a text in quotes, and not be empty", field=key)
    if required and not value:
        raise InvalidOption(
            f"the {key} of a model is missing; write {key} = with a Hugging Face id, a folder or faq", field=key
        )
    return value


def _texts(table: Mapping[str, Any], key: str) -> list[str]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidOption(f'{key} must be a list of texts, like ["a", "b"]', field=key)
    return value


def _boolean(table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise InvalidOption(f"{key} must be true or false", field=key)
    return value


def _integer(table: Mapping[str, Any], key: str) -> int:
    value = table.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
        raise InvalidOption(f"{key} must be a whole number", field=key)
    return value


def _replicas(table: Mapping[str, Any]) -> int | None:
    """Return how many replicas a model has; None uses idle Macs."""
    value = table.get("replicas", 1)
    if value == AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_REPLICAS:
        raise InvalidOption(f'replicas must be "{AUTO}" or a number from 1 to {MAX_REPLICAS}', field="replicas")
    return value


def _parse_options(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``LoadOrder`` that a table sets. Raise InvalidOption."""
    command = _order_command()
    known = {key_of(one): one for one in command.params if is_settable(one)}
    names = {}
    with command.make_context(TABLE, []) as ctx:
        for key, value in table.items():
            if key not in known:
                close = get_close_matches(key, (*known, *_OWN_KEYS), n=1)
                hint = f"did you mean {close[0]}?" if close else "`macpipe models --help` tells what a model has"
                raise InvalidOption(f"unknown key {key[:64]}; {hint}", field=key)
            check_value(key, known[key], value, ctx)
            names[str(known[key].name)] = value
    with command.make_context(TABLE, [], default_map=names) as ctx:
        fields: dict[str, Any] = command.invoke(ctx)
    return {_FIELDS.get(name, name): fields[_FIELDS.get(name, name)] for name in names}


@cache
def _order_command() -> Any:
    """Return a command that has the options of a model alone, and returns them."""

    @takes_options(model_options)
    def order(options: Any = None) -> Any:
        return options

    made = typer.Typer(add_completion=False)
    made.command()(order)
    return typer.main.get_command(made)
