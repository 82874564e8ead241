"""``macpipe drain NAME``: moves a worker's layers to others, so that its Mac can be taken out of use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.cluster_state import holders_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.client import ClusterState


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
        outcome = "is in use again" if undo else "holds no layers"
        sys.stdout.write(f"{'; '.join((f'{name} {outcome}', *describe_rings(state)))}\n")


def describe_rings(state: ClusterState) -> Iterator[str]:
    """Yield, for each model that is loaded, who holds its layers: ``big: w2 0-3, w3 4-7``."""
    for name, ring in state.rings:
        if held := holders_in_words(ring.stages):
            yield f"{name}: {held}" if name else held
