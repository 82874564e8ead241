"""``macpipe adapter add|list|remove``: changes the adapters of a running coordinator's model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.cli.plan_options import parse_adapters
from cluster.cli.screen import format_bytes
from cluster.core.adapter import join_model_name
from cluster.core.errors import ModelNotFound
from cluster.core.text import count_in_words, names_in_words

if TYPE_CHECKING:
    from cluster.client import AdapterState, ClusterState

adapter = typer.Typer(name="adapter", help="Add, list and remove adapters of the served model.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
BaseModel = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The model that it is for.", show_default="the default one")
]


@adapter.command(cls=Command)
def add(
    written: Annotated[
        str,
        typer.Argument(metavar="NAME=FOLDER", help="A name, and a folder with adapter_config.json on the coordinator."),
    ],
    model: BaseModel = "",
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Load an adapter beside the served model.

    Requests choose it with the model BASE:NAME, or with --adapter NAME. Others go on meanwhile.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        ((name, folder),) = parse_adapters([written]).items()
        added = client.add_adapter(name, folder, model=model)
        if json:
            from cluster.cli.json_output import print_json

            print_json(added)
            return
        sys.stdout.write(f"added {added.name} ({format_bytes(added.nbytes)})\n")


@adapter.command("list", cls=Command)
def list_adapters(
    model: BaseModel = "", coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False
) -> None:
    """List the adapters of the served model."""
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        name, adapters = find_adapters(client.cluster(), model)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"model": name or None, "adapters": adapters})
            return
        for one in adapters:
            shown, size = join_model_name(name, one.name), format_bytes(one.nbytes)
            sys.stdout.write(f"{shown}  {size}  {one.fingerprint[:12]}\n")
        if not adapters:
            sys.stderr.write(f"{name} has no adapters\n" if name else "no model is loaded\n")


def find_adapters(state: ClusterState, model: str) -> tuple[str, tuple[AdapterState, ...]]:
    """Return a model's name and its adapters; "" is the default model. Raise ModelNotFound."""
    if not model or model == state.model:
        return state.model, state.adapters
    found = next((one for one in state.deployments if model in (one.name, *one.aliases, one.model)), None)
    if found is None:
        names = names_in_words([one.name for one in state.deployments] or [state.model or "none"])
        raise ModelNotFound(f"no model is named {model[:64]}; the models are {names}", field="model")
    return found.name, found.adapters


@adapter.command(cls=Command)
def remove(
    name: Name, model: BaseModel = "", coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False
) -> None:
    """Remove an adapter.

    Ends its running answers and frees its memory.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        ended = client.remove_adapter(name, model=model)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"removed": name, "ended_requests": ended})
            return
        requests = f", ended {count_in_words(ended, 'request')}" if ended else ""
        sys.stdout.write(f"removed {name}{requests}\n")
