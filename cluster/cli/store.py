"""``macpipe store list|rm|prune|quota``: shows and removes the models that macpipe has fetched to this Mac."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Home, Json
from cluster.core.errors import InvalidOption
from cluster.core.text import count_in_words, parse_duration, parse_size
from cluster.platform.paths import state_home

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.store.stored_models import StoredModel

store = typer.Typer(name="store", help="List and remove the models on this Mac's disk.", no_args_is_help=True)


@store.command("list", cls=Command)
def list_stored(home: Home = None, json: Json = False) -> None:
    """List the models that macpipe has fetched to this Mac.

    Models in the Hugging Face cache (HF_HOME) and in folders of your own are not among them. With --json, layers are
    [start, end): [0, 27] means layers 0-26.
    """
    from cluster.store.stored_models import list_models

    with errors_in_json(json):
        folder = state_home(home)
        stored = list_models(folder)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"folder": str(folder / "models"), "models": stored})
        elif stored:
            _print_table(stored, folder)
        else:
            sys.stdout.write(f"no models in {folder / 'models'}\n")


@store.command("rm", cls=Command)
def remove(
    model: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Hugging Face ids, or starts of fingerprints.")
    ],
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove models from this Mac's disk.

    A model that a worker or coordinator of this Mac has open is not removed. Other Macs keep their layers.
    """
    from cluster.store.stored_models import find_models, list_models

    with errors_in_json(json):
        folder = state_home(home)
        stored = list_models(folder)
        found = dict.fromkeys(one for name in model for one in find_models(stored, name))
        _remove(tuple(found), folder, json)


@store.command(cls=Command)
def prune(
    unused: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Remove what was not used for so long, like 12h or 30d."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Remove the least recently used until the store has this size, like 200GiB."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove the least recently used models from this Mac's disk.

    Needs --unused, --keep or both. Also removes what interrupted downloads left behind a day ago or earlier.
    """
    from cluster.store.stored_models import choose_for_pruning, list_models, remove_leftovers

    with errors_in_json(json):
        if unused is None and keep is None:
            raise InvalidOption("say what to remove: --unused DURATION, --keep SIZE or both", field="unused")
        folder = state_home(home)
        chosen = choose_for_pruning(
            list_models(folder),
            time.time(),
            unused_s=parse_duration(unused, "--unused") if unused else None,
            keep_bytes=parse_size(keep, "--keep") if keep else None,
        )
        if dry_run:
            _report(chosen, 0, json, "would remove")
        else:
            _remove(chosen, folder, json, remove_leftovers(folder))


@store.command(cls=Command)
def quota(
    size: Annotated[
        str | None, typer.Argument(metavar="[SIZE]", help="Like 500GiB; off removes the quota.", show_default=False)
    ] = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Show or set how much of this Mac's disk the models may take.

    A fetch that would exceed it first removes the least recently used models. Those that are open stay.
    """
    from cluster.cli.screen import format_bytes
    from cluster.store.disk_quota import read_quota, set_quota

    with errors_in_json(json):
        folder = state_home(home)
        if size is not None:
            set_quota(folder, None if size == "off" else parse_size(size, "SIZE"))
        current = read_quota(folder)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"quota_bytes": current})
        else:
            sys.stdout.write(f"the store may take {format_bytes(current)}\n" if current else "the store has no quota\n")


def _remove(chosen: Sequence[StoredModel], home: Path, json: bool, freed: int = 0) -> None:
    """Remove the models, and report those removed even if a later one cannot be."""
    from cluster.store.stored_models import remove_model

    removed = []
    try:
        for one in chosen:
            remove_model(home, one.fingerprint)
            removed.append(one)
    finally:
        if len(removed) == len(chosen) or (removed and not json):
            _report(removed, freed, json, "removed")


def _report(models: Sequence[StoredModel], freed: int, json: bool, did: str) -> None:
    from cluster.cli.screen import format_bytes, printable

    total = freed + sum(one.disk_bytes for one in models)
    if json:
        from cluster.cli.json_output import print_json

        print_json({did.replace(" ", "_"): models, "bytes": total})
        return
    for one in models:
        sys.stdout.write(f"{did} {printable(one.label)} ({format_bytes(one.disk_bytes)})\n")
    if not models:
        freed_too = f"; freed {format_bytes(freed)} of interrupted downloads" if freed else ""
        sys.stdout.write(f"no model to remove{freed_too}\n")


def _print_table(stored: Sequence[StoredModel], home: Path) -> None:
    from cluster.cli.screen import console, format_bytes, format_share, printable, table

    shown = table("model", "layers here", "on disk", "last used", right=frozenset({"on disk"}))
    for one in stored:
        ranges = ", ".join(map(str, one.layers)) or "none"
        used = "in use" if one.in_use else _ago(time.time() - one.last_used)
        size = format_share(one.disk_bytes, one.model_bytes) if one.model_bytes else format_bytes(one.disk_bytes)
        shown.add_row(printable(one.label), ranges, size, used)
    screen: Any = console(sys.stdout)
    screen.print(shown)
    total = format_bytes(sum(one.disk_bytes for one in stored))
    sys.stdout.write(f"\n{count_in_words(len(stored), 'model')}, {total} in {home / 'models'}\n")


def _ago(seconds: float) -> str:
    from cluster.cli.screen import format_duration

    return f"{format_duration(max(0.0, seconds))} ago"
