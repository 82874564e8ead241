"""``macpipe handover NAME``: has a standby lead, so that the coordinator's Mac can be taken out of use."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json


def handover(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="The standby's Mac, or its name in `macpipe status`; else any in sync."),
    ] = "",
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Have a standby lead in place of the coordinator.

    Running answers continue there, for gRPC and for HTTP that a standby passes on. HTTP programs that read from this
    coordinator itself get an error and must send their request again. The coordinator stands by afterwards. If the
    standby has only begun to follow, this waits for up to 5 s until it has read the model.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        heir = client.hand_over(name)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"standby": heir})
            return
        sys.stdout.write(f"{heir} takes over\n")
