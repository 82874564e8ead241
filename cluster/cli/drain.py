"""``macpipe drain NAME``: moves a worker's layers to others, so that its Mac can be taken out of use."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.cluster_state import holders_in_words


def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The worker's name, as in `macpipe status`.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take the worker back into use.")] = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Move a worker's layers to other workers.

    Running answers continue. The worker gets no layers until --undo or until it restarts.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        state = client.drain(name, undo=undo)
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
            return
        held = holders_in_words(state.stages)
        outcome = "is in use again" if undo else "holds no layers"
        sys.stdout.write(f"{name} {outcome}{f'; {held}' if held else ''}\n")
