"""``macpipe remove NAME``: throw a Mac out of the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.join_port import Cluster
from cluster.cli.options import Json
from cluster.platform.paths import state_home


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member, as `macpipe members` calls it.")],
    cluster: Cluster = "default",
    json: Json = False,
    home: Annotated[Path | None, typer.Option(help="The cluster is kept here; else MACPIPE_HOME.")] = None,
) -> None:
    """Throw a member out of the cluster.

    Its certificates are refused from now on. A running coordinator takes note within seconds, and answers go on
    without it. It can come back by a new token alone.
    """
    from cluster.security.authority import Authority
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.members import Members

    with errors_in_json(json):
        folder = ClusterFolder(state_home(home), cluster)
        Authority.load(folder)
        gone = Members(folder).remove(name)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"name": gone.name, "role": gone.role.value, "id": gone.id, "removed": gone.removed})
        else:
            sys.stdout.write(f"{gone.name} ({gone.role}) is removed; its certificates are refused from now on\n")
