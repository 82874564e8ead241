"""``macpipe store list|rm|prune|quota``: shows and removes the models that macpipe has fetched to this or all Macs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import FAILED, errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Coordinator, Home, Json
from cluster.core.errors import InvalidOption
from cluster.core.text import count_in_words, parse_duration, parse_size
from cluster.platform.paths import state_home

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from cluster.core.stored_models import MacStore, StoredModel, StoreRemoval

store = typer.Typer(name="store", help="List and remove the models on the disks of Macs.", no_args_is_help=True)


@store.command("list", cls=Command)
def list_stored(
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="List what is on every Mac of the cluster, through its coordinator.")
    ] = False,
    coordinator: Coordinator = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """List the models that macpipe has fetched to this Mac.

    Models in the Hugging Face cache (HF_HOME) and in folders of your own are not among them. With --json, layers are
    [start, end): [0, 27] means layers 0-26. With --everywhere, exits with 1 if a Mac could not be asked.
    """
    from cluster.store.stored_models import list_models

    with errors_in_json(json):
        _require_one_place(everywhere, coordinator, home)
        if everywhere:
            _list_everywhere(coordinator, json)
            return
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
        list[str],
        typer.Argument(metavar="MODEL...", help="Names that `store list` shows, or starts of fingerprints."),
    ],
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Remove them from every Mac of the cluster, through its coordinator.")
    ] = False,
    coordinator: Coordinator = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove models from this Mac's disk.

    A model that a worker or coordinator of this Mac has open is not removed. Other Macs keep their layers. With
    --everywhere, nothing is removed if a Mac uses one of the models; exits with 1 if a Mac could not be asked or keeps
    a model.
    """
    from cluster.store.stored_models import find_models, list_models

    with errors_in_json(json):
        _require_one_place(everywhere, coordinator, home)
        if everywhere:
            _remove_everywhere(model, coordinator, json)
            return
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


def _require_one_place(everywhere: bool, coordinator: str | None, home: Path | None) -> None:
    """Raise InvalidOption for options of which one concerns this Mac and the other all Macs."""
    if everywhere and home is not None:
        raise InvalidOption("--home is for this Mac's store; leave it out with --everywhere", field="home")
    if coordinator is not None and not everywhere:
        raise InvalidOption("--coordinator needs --everywhere", field="coordinator")


def _list_everywhere(coordinator: str | None, json: bool) -> None:
    from cluster.client import Client

    with Client(coordinator) as client:
        stores = client.stored_models()
    if json:
        from cluster.cli.json_output import print_json

        print_json({"stores": stores})
    else:
        _print_stores(stores)
    if any(one.problem for one in stores):
        raise typer.Exit(FAILED)


def _remove_everywhere(models: Sequence[str], coordinator: str | None, json: bool) -> None:
    from cluster.client import Client

    with Client(coordinator) as client:
        removals = client.remove_stored(*models)
    if json:
        from cluster.cli.json_output import print_json

        print_json({"removals": removals})
    else:
        _print_removals(removals)
    if any(one.problem for one in removals):
        raise typer.Exit(FAILED)


def _print_removals(removals: Sequence[StoreRemoval]) -> None:
    from cluster.cli.screen import format_bytes, note, printable

    for one in removals:
        if not one.problem:
            sys.stdout.write(
                f"removed {printable(one.model)} on {printable(one.mac)} ({format_bytes(one.freed_bytes)})\n"
            )
    for one in removals:
        if one.problem and one.model:
            note(f"kept {one.model} on {one.mac}: {one.problem}")
        elif one.problem:
            note(f"{one.mac} keeps what it has: {one.problem}")


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


def _print_stores(stores: Sequence[MacStore]) -> None:
    """Print the models of all Macs, each with a line for each Mac that has layers of it."""
    from cluster.cli.screen import console, note, printable, table

    shown = table("model", "Mac", "layers there", "on disk", "last used", right=frozenset({"on disk"}))
    having: dict[str, list[tuple[str, StoredModel]]] = {}
    for store in stores:
        for model in store.models:
            having.setdefault(model.fingerprint, []).append((store.mac, model))
    for found in having.values():
        label = next((model.label for _, model in found if model.names), found[0][1].label)
        for mac, model in found:
            _add_row(shown, model, printable(label), printable(mac))
            label = ""
    screen = console(sys.stdout)
    if having:
        screen.print(shown)
        sys.stdout.write(f"\n{count_in_words(len(having), 'model')} on {count_in_words(len(stores), 'Mac')}\n")
    else:
        sys.stdout.write("no models in the stores of the cluster's Macs\n")
    for store in stores:
        if store.problem:
            note(f"the store of {store.mac} is not known: {store.problem}")
        if store.omitted:
            note(f"{store.mac} has {count_in_words(store.omitted, 'more model')}; see `macpipe store list` there")


def _print_table(stored: Sequence[StoredModel], home: Path) -> None:
    from cluster.cli.screen import console, format_bytes, printable, table

    shown = table("model", "layers here", "on disk", "last used", right=frozenset({"on disk"}))
    for one in stored:
        _add_row(shown, one, printable(one.label))
    screen = console(sys.stdout)
    screen.print(shown)
    total = format_bytes(sum(one.disk_bytes for one in stored))
    sys.stdout.write(f"\n{count_in_words(len(stored), 'model')}, {total} in {home / 'models'}\n")


def _add_row(shown: Table, model: StoredModel, *first: str) -> None:
    from cluster.cli.screen import format_bytes, format_share

    ranges = ", ".join(map(str, model.layers)) or "none"
    used = "in use" if model.in_use else _ago(time.time() - model.last_used)
    whole = model.model_bytes <= model.disk_bytes  # a whole model takes more than its tensors; damaged records say 0
    size = format_bytes(model.disk_bytes) if whole else format_share(model.disk_bytes, model.model_bytes)
    shown.add_row(*first, ranges, size, used)


def _ago(seconds: float) -> str:
    from cluster.cli.screen import format_duration

    return f"{format_duration(max(0.0, seconds))} ago"
