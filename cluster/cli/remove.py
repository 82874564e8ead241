"""``macpipe remove NAME``: removes a member from the cluster."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Home, Json, open_folder, require_coordinator


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member's name, as in `macpipe members`.")],
    cluster: Cluster = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Remove a member from the cluster.

    Its certificates are refused from now on. A running coordinator notices within seconds, and answers continue
    without it. Only a new join token lets it back in. Waits a few seconds for the standbys to store it.
    """
    from cluster.cli.stored_edits import confirm_members, print_standbys
    from cluster.security.members import Members

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        require_coordinator(folder)
        removed = Members(folder).remove(name)
        standbys = confirm_members(folder)
        if json:
            from cluster.cli.json_output import print_json

            facts = {"name": removed.name, "role": removed.role.value, "id": removed.id, "removed": removed.removed}
            print_json(facts | {"standbys": standbys})
        else:
            sys.stdout.write(f"{removed.name} ({removed.role}) is removed; its certificates are refused from now on\n")
            print_standbys(standbys)
