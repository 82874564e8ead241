"""``macpipe unload``: unloads a model of a running coordinator."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.errors import InvalidOption


def unload(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name of the model. Without one, the only model that is loaded.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Unload every model.")] = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Unload a model of a running coordinator.

    Ends its running answers, or its load, and frees the workers' memory.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        if name and every:
            raise InvalidOption("a model is named, and --all means every model; give one of both", field="all")
        unloaded = client.unload(name, every=every)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"unloaded": unloaded if every else next(iter(unloaded), None)})
            return
        sys.stdout.write(f"unloaded {', '.join(unloaded)}\n" if unloaded else "nothing was loaded\n")
